"""DiagonalFisherOptimizer: Adam in the limit, the true Fisher by brute force, exact resume, clips and simplex rows."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qig_core.errors import FisherNotReady, InvalidConfig, InvalidInput
from qig_core.optimizers import DiagonalFisherOptimizer


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def _batches(count: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(count)
    ]


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def _weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_adam_in_the_limit(decay: float):
    ours, theirs = _net(), _net()
    mine = DiagonalFisherOptimizer(
        ours.parameters(), lr=1e-2, betas=(0.9, 0.999), damping=1e-16, trust=math.inf, weight_decay=decay
    )
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    batches = _batches(100)
    _train(ours, mine, batches)
    _train(theirs, reference, batches)
    assert (_weights(ours) - _weights(theirs)).abs().max() < 1e-6
    assert (_weights(ours) - _weights(_net())).abs().max() > 0.1


def test_equals_adam_itself_without_decay():
    ours, theirs = _net().double(), _net().double()
    batches = [(x.double(), y) for x, y in _batches(50)]
    _train(ours, DiagonalFisherOptimizer(ours.parameters(), lr=1e-2, betas=(0.9, 0.999), trust=math.inf), batches)
    _train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-2), batches)
    assert (_weights(ours) - _weights(theirs)).abs().max() < 1e-6


def test_model_fisher_is_the_true_diagonal_of_a_softmax():
    """Three classes, one linear layer: F = E_x sum_y p(y) (grad log p(y))^2 in closed form."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    p = torch.softmax(layer(x), -1).detach()
    # d log p(y) / d logit_c = [c = y] - p_c, whose second moment over y is p_c (1 - p_c).
    exact_bias = (p * (1 - p)).mean(0)
    exact_weight = torch.einsum("nc,nd->cd", p * (1 - p), x**2) / len(x)
    optimizer = DiagonalFisherOptimizer(layer.parameters(), betas=(0.9, 0.9995), fisher="model")
    generator = torch.Generator().manual_seed(1)

    def sampled() -> torch.Tensor:
        logits = layer(x)
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator).squeeze(-1)
        return F.cross_entropy(logits, drawn)

    updates = 6000
    for _ in range(updates):
        optimizer.update_fisher(sampled, samples=len(x))
    correction = 1 - 0.9995**updates
    weight, bias = (optimizer.state[q]["fisher"] / correction for q in (layer.weight, layer.bias))
    assert torch.allclose(bias, exact_bias, rtol=0.08)
    assert torch.allclose(weight, exact_weight, rtol=0.15, atol=0.01)


def test_model_fisher_is_unbiased_by_enumeration():
    """Through a hidden layer: the mean over *all* labellings of a batch equals diag J' (diag p - p p') J, exactly."""
    net = _net().double()
    params = list(net.parameters())
    x = _batches(1)[0][0][:3].double()
    p = torch.softmax(net(x), -1).detach()  # [3, 3]
    expected = torch.zeros_like(_weights(net))
    for n in range(3):
        rows = [torch.autograd.grad(net(x)[n, c], params) for c in range(3)]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # [C, P]
        covariance = torch.diag(p[n]) - torch.outer(p[n], p[n])
        expected += torch.einsum("cp,cd,dp->p", jacobian, covariance, jacobian) / 3
    mean = torch.zeros_like(expected)
    for labels in itertools.product(range(3), repeat=3):
        drawn = torch.tensor(labels)
        optimizer = DiagonalFisherOptimizer(params, betas=(0.9, 0.0), fisher="model")
        optimizer.update_fisher(lambda drawn=drawn: F.cross_entropy(net(x), drawn), samples=3)
        probability = p[torch.arange(3), drawn].prod()
        mean += probability * torch.cat([optimizer.state[q]["fisher"].flatten() for q in params])
    assert torch.allclose(mean, expected, rtol=1e-9, atol=1e-15)
    assert float(expected.max()) > 1e-3


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("trust", [math.inf, 0.6])
@pytest.mark.parametrize("relative_damping", [0.0, 0.1])
@pytest.mark.parametrize("kl_limit", [None, 1e-3])
def test_equals_the_rule_as_it_is_written(exponent: float, trust: float, relative_damping: float, kl_limit):
    """The module docstring, line by line in float64, against the implementation that saves passes."""
    lr, beta1, beta2, damping, decay = 0.05, 0.8, 0.95, 1e-4, 0.1
    net = _net().double()
    params = list(net.parameters())
    theta = [p.detach().clone() for p in params]
    m, f = ([torch.zeros_like(p) for p in params] for _ in range(2))
    optimizer = DiagonalFisherOptimizer(
        params, lr, (beta1, beta2), "empirical", exponent, damping, relative_damping, trust, decay, kl_limit
    )
    for t, (x, y) in enumerate(_batches(6), start=1):
        optimizer.zero_grad()
        F.cross_entropy(net(x.double()), y).backward()
        directions, fishers, clipped = [], [], 0
        for i, p in enumerate(params):
            m[i] = beta1 * m[i] + (1 - beta1) * p.grad
            f[i] = beta2 * f[i] + (1 - beta2) * p.grad**2
            fisher = f[i] / (1 - beta2**t)
            level = damping + relative_damping * float(fisher.mean())
            d = m[i] / (1 - beta1**t) / (fisher**exponent + level**exponent)
            rms = float(d.square().mean().sqrt())
            clipped += rms > trust
            directions.append(d * min(1.0, trust / rms))
            fishers.append(fisher)
        divergence = sum(0.5 * lr**2 * float((d * d * g).sum()) for d, g in zip(directions, fishers, strict=True))
        shrink = 1.0 if kl_limit is None else min(1.0, math.sqrt(kl_limit / divergence))
        theta = [p * (1 - lr * decay) - lr * shrink * d for p, d in zip(theta, directions, strict=True)]
        optimizer.step()
        assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(params, theta, strict=True))
        said = optimizer.statistics
        assert said["clip_rate"] == clipped / len(params)
        assert said["fisher_mean"] == pytest.approx(float(torch.cat([g.flatten() for g in fishers]).mean()))
        if kl_limit is not None:
            assert said["kl_estimate"] == pytest.approx(divergence * shrink**2)


def test_empirical_fisher_is_the_corrected_average_of_squares():
    p = nn.Parameter(torch.zeros(3))
    optimizer = DiagonalFisherOptimizer([p], betas=(0.0, 0.5))
    squares = []
    for gradient in ([1.0, -2.0, 0.0], [3.0, 0.5, 0.0]):
        p.grad = torch.tensor(gradient)
        squares.append(p.grad**2)
        optimizer.step()
    assert torch.allclose(optimizer.state[p]["fisher"], 0.25 * squares[0] + 0.5 * squares[1])
    expected = float((squares[0] / 3 + 2 * squares[1] / 3).mean())
    assert optimizer.statistics["fisher_mean"] == pytest.approx(expected)
    assert optimizer.statistics["grad_norm"] == pytest.approx(math.sqrt(9.25))


def test_statistics_before_the_first_step():
    optimizer = DiagonalFisherOptimizer(_net().parameters())
    said = optimizer.statistics
    assert said["fisher_mean"] == said["clip_rate"] == said["grad_norm"] == 0.0
    assert math.isnan(said["kl_estimate"])


def test_exponent_one_is_invariant_to_diagonal_reparametrisation():
    """theta = s * phi: a natural-gradient step moves the same function, whatever s is."""
    scale = torch.tensor([0.1, 1.0, 20.0])
    steps = []
    for s in (torch.ones(3), scale):
        p = nn.Parameter(torch.ones(3) / s)
        optimizer = DiagonalFisherOptimizer([p], lr=0.1, betas=(0.0, 0.9), exponent=1.0, damping=0.0, trust=math.inf)
        p.grad = torch.tensor([0.3, -2.0, 5.0]) * s
        optimizer.step()
        steps.append(p.detach() * s)
    assert torch.allclose(steps[0], steps[1], atol=1e-5)


def _path(scale: float, exponent: float, fisher: str) -> torch.Tensor:
    """Thirty steps of softmax regression on the parameters theta / scale; returns theta."""
    generator = torch.Generator().manual_seed(2)
    scales = scale ** torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
    phi = nn.Parameter(torch.randn(3, 6, dtype=torch.float64, generator=generator) / scales)
    optimizer = DiagonalFisherOptimizer(
        [phi], lr=1e-3, betas=(0.9, 0.99), fisher=fisher, exponent=exponent, damping=0.0, trust=math.inf, fisher_every=3
    )
    for x, y in _batches(30):
        logits = x.double() @ (scales * phi).T
        if optimizer.fisher_due:
            drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator).squeeze(-1)
            optimizer.update_fisher(lambda z=logits, drawn=drawn: F.cross_entropy(z, drawn), len(x))
            logits = x.double() @ (scales * phi).T
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
    return (scales * phi).detach()


@pytest.mark.parametrize("fisher", ["empirical", "model"])
def test_the_natural_path_does_not_depend_on_the_units_of_the_parameters(fisher: str):
    """p = 1 follows the same path whatever the parameters are measured in; p = 1/2 does not."""
    assert torch.allclose(_path(1.0, 1.0, fisher), _path(30.0, 1.0, fisher), rtol=1e-6, atol=1e-9)
    assert (_path(1.0, 0.5, fisher) - _path(30.0, 0.5, fisher)).abs().max() > 1e-2


def test_model_fisher_must_be_estimated_first_and_says_when_it_is_due():
    net = _net()
    optimizer = DiagonalFisherOptimizer(net.parameters(), fisher="model", fisher_every=3)
    x, y = _batches(1)[0]
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(FisherNotReady, match="update_fisher"):
        optimizer.step()
    due = []
    for _ in range(7):
        due.append(optimizer.fisher_due)
        if due[-1]:
            kept = [p.grad.clone() for p in net.parameters()]
            optimizer.update_fisher(lambda: F.cross_entropy(net(x), y), len(x))
            assert all(torch.equal(a, p.grad) for a, p in zip(kept, net.parameters(), strict=True))
        optimizer.step()
        optimizer.check_invariants()
    assert sum(due) == 3
    with pytest.raises(InvalidInput):
        DiagonalFisherOptimizer(_net().parameters()).update_fisher(lambda: torch.tensor(0.0), 1)


@pytest.mark.parametrize("fisher", ["empirical", "model"])
def test_resume_is_bit_identical(fisher: str):
    def advance(net: nn.Module, optimizer: DiagonalFisherOptimizer, batches: list) -> None:
        for x, y in batches:
            if optimizer.fisher_due:
                optimizer.update_fisher(lambda x=x, y=y: F.cross_entropy(net(x), y), len(x))
            _train(net, optimizer, [(x, y)])

    def fresh(net: nn.Module) -> DiagonalFisherOptimizer:
        return DiagonalFisherOptimizer(net.parameters(), fisher=fisher, relative_damping=1e-3, fisher_every=4)

    batches = _batches(30)
    whole = _net()
    advance(whole, fresh(whole), batches)
    first = _net()
    stopped = fresh(first)
    advance(first, stopped, batches[:13])
    resumed = _net(seed=5)
    resumed.load_state_dict(first.state_dict())
    continued = fresh(resumed)
    continued.load_state_dict(copy.deepcopy(stopped.state_dict()))
    advance(resumed, continued, batches[13:])
    assert torch.equal(_weights(whole), _weights(resumed))


def test_a_state_of_the_other_fisher_is_refused():
    net = _net()
    other = DiagonalFisherOptimizer(net.parameters(), fisher="model")
    with pytest.raises(InvalidInput, match="empirical"):
        DiagonalFisherOptimizer(net.parameters()).load_state_dict(other.state_dict())


def test_trust_clip_bounds_the_step_and_is_counted():
    p = nn.Parameter(torch.zeros(100))
    optimizer = DiagonalFisherOptimizer([p], lr=0.5, betas=(0.0, 0.999), exponent=1.0, damping=1e-12, trust=0.3)
    p.grad = torch.full((100,), 1e-4)
    optimizer.step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.15, rel=1e-4)
    assert optimizer.statistics["clip_rate"] == 1.0


def test_kl_limit_bounds_the_quadratic_divergence():
    net = _net()
    before = _weights(net)
    optimizer = DiagonalFisherOptimizer(net.parameters(), lr=1.0, trust=math.inf, kl_limit=1e-3)
    _train(net, optimizer, _batches(1))
    fisher = torch.cat([optimizer.state[p]["fisher"].flatten() for p in net.parameters()]) / (1 - 0.99)
    moved = _weights(net) - before
    assert float(0.5 * (moved * moved * fisher).sum()) == pytest.approx(1e-3, rel=1e-3)
    assert optimizer.statistics["kl_estimate"] == pytest.approx(1e-3, rel=1e-3)


def test_simplex_groups_stay_distributions_and_descend():
    net, rows = _net(), nn.Parameter(torch.full((4, 3), 1 / 3))
    optimizer = DiagonalFisherOptimizer(
        [{"params": net.parameters()}, {"params": [rows], "simplex": True, "lr": 0.5}], lr=1e-2
    )
    target = torch.tensor([0, 1, 2, 1])
    for _ in range(100):
        optimizer.zero_grad()
        F.nll_loss(rows.log(), target).backward()
        optimizer.step()
        optimizer.check_invariants()
    assert (rows.argmax(-1) == target).all()
    assert rows.detach().max(-1).values.min() > 0.9


def test_parameters_without_gradient_are_left_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = DiagonalFisherOptimizer([used, unused], weight_decay=0.5)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert not torch.equal(used.detach(), torch.ones(2))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"exponent": 0.0},
        {"exponent": 1.5},
        {"damping": -1.0},
        {"trust": 0.0},
        {"kl_limit": 0.0},
        {"fisher": "true"},
        {"fisher_every": 0},
        {"weight_decay": -0.1},
        {"relative_damping": -0.1},
    ],
)
def test_impossible_options_are_errors(options: dict):
    with pytest.raises(InvalidConfig, match=next(iter(options))):
        DiagonalFisherOptimizer(_net().parameters(), **options)
