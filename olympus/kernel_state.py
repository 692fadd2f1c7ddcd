"""What a live kernel is, apart from its experiences: weights, averages, optimizer, Phi window and counters.

Saved and restored bit-exactly. There is no random stream to save: initial weights follow from the seed, batches from
seed and step (``experience_buffer``), Phi uses fixed seeds of its own. (A kernel with ``dropout`` above 0 draws from
torch's global generator and is the one exception.)

Not here: training it (``training_session``), the directory format (``checkpoint_files``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from olympus.checkpoint_files import Loaded
from olympus.errors import CheckpointInvalid, InvalidRequest
from qig_core.errors import KernelMathError
from qig_core.learning import Ema, TrainingDefaults
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.regime import PhiWindow

PHI_WINDOW = 100
#: Training options that a user may set, with their least and greatest value.
_TUNABLE: dict[str, tuple[float, float]] = {
    "lr": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "warmup_steps": (0, 100_000),
    "batch_size": (1, 512),
    "observation_weight": (0.0, 10.0),
    "halt_weight": (0.0, 10.0),
    "deep_every": (1, 1000),
    "ema_decay": (0.0, 0.99999),
}


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """The shape of a kernel and how it learns: what its row stores as ``config``."""

    network: KernelConfig
    training: TrainingDefaults

    @classmethod
    def make(cls, preset: str, overrides: dict[str, Any]) -> KernelPlan:
        """A preset with single values replaced. Raises ``InvalidRequest`` for an unknown or impossible one."""
        network = {name: value for name, value in overrides.items() if name not in _TUNABLE}
        training: dict[str, Any] = {name: _in_range(name, overrides[name]) for name in _TUNABLE if name in overrides}
        try:
            return cls(KernelConfig.preset(preset, **network), TrainingDefaults(**training))
        except KernelMathError as error:
            raise InvalidRequest(f"config: {error}; training options are {', '.join(_TUNABLE)}") from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "network": self.network.to_dict(),
            "training": {**asdict(self.training), "betas": [*self.training.betas]},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> KernelPlan:
        """Inverse of ``to_json``."""
        training = dict(value["training"])
        training["betas"] = tuple(training["betas"])
        return cls(KernelConfig.from_dict(value["network"]), TrainingDefaults(**training))


@dataclass(slots=True)
class Progress:
    """Counters and last measurements; plain JSON types. Losses are nats per byte. None: not measured."""

    step: int = 0
    bytes_seen: int = 0
    loss_ema: float | None = None
    holdout_loss: float | None = None  # of the EMA weights
    raw_holdout_loss: float | None = None  # of the weights that are being trained
    baseline_loss: float | None = None
    uniform_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    examination: str = ""  # which questions these losses belong to
    patience_from: float | None = None  # the held-out loss that has to be beaten
    evaluations: int = 0
    unimproved: int = 0
    loss_ok: bool | None = None
    gate_reason: str = ""
    drift: float | None = None
    integration: dict[str, Any] = field(default_factory=dict)
    basin: list[float] = field(default_factory=list)
    next_phi: int = 0
    next_evaluation: int = 0
    lr_scale: float = 1.0
    train_seconds: float = 0.0
    phi_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    prequential_seconds: float = 0.0
    plasticity_seconds: float = 0.0
    plasticity: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    restored_from: str | None = None


class KernelState:
    """A kernel between two steps. Used by one thread at a time."""

    def __init__(self, plan: KernelPlan, seed: int):
        self.plan = plan
        self.seed = seed
        self.kernel = M8Kernel(plan.network, seed=seed)
        self.kernel.train()
        self.ema = Ema(self.kernel, plan.training.ema_decay)
        self.optimizer = plan.training.optimizer(self.kernel)
        self.phi_window = PhiWindow(PHI_WINDOW)
        self.progress = Progress()
        #: EMA weights with the lowest held-out loss so far.
        self.best: dict[str, Tensor] | None = None

    def noise_of(self, step: int) -> torch.Generator | None:
        """Draws the recursion's noise of one step, the same whenever the step is taken; None where there is none."""
        if self.plan.network.noise == 0:
            return None
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def remember_best(self) -> None:
        """Keep a copy of the EMA weights as the best ones."""
        self.best = {name: tensor.clone() for name, tensor in self.ema.shadow.state_dict().items()}

    def best_kernel(self) -> M8Kernel | None:
        """A fresh kernel with the best weights, or None when none were measured."""
        return None if self.best is None else kernel_with(self.plan, self.best)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensor files of a checkpoint, by name; live references, to be written before the next step."""
        optimizer = self.optimizer.state_dict()["state"]
        parts = {
            "model": dict(self.kernel.state_dict()),
            "ema": dict(self.ema.shadow.state_dict()),
            "optim": {
                f"{index}.{name}": value
                for index, slots in optimizer.items()
                for name, value in slots.items()
                if isinstance(value, Tensor)
            },
        }
        return parts if self.best is None else {**parts, "best": self.best}

    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON types."""
        optimizer = self.optimizer.state_dict()
        scalars = {
            str(index): {name: value for name, value in slots.items() if not isinstance(value, Tensor)}
            for index, slots in optimizer["state"].items()
        }
        return {
            "plan": self.plan.to_json(),
            "seed": self.seed,
            "progress": asdict(self.progress),
            "phi_window": self.phi_window.state_dict(),
            "ema": {"steps": self.ema.steps, "decay": self.ema.decay},
            "optimizer": {"scalars": scalars, "groups": optimizer["param_groups"]},
        }

    @classmethod
    def restore(cls, loaded: Loaded) -> KernelState:
        """The kernel of a verified checkpoint. Raises ``CheckpointInvalid`` when parts do not fit together."""
        try:
            saved, tensors = loaded.state, loaded.tensors
            state = cls(KernelPlan.from_json(saved["plan"]), int(saved["seed"]))
            state.kernel.load_state_dict(tensors["model"])
            state.ema.load_state_dict({**saved["ema"], "shadow": tensors["ema"]})
            state.optimizer.load_state_dict(_optimizer_state(saved["optimizer"], tensors["optim"]))
            state.phi_window.load_state_dict(saved["phi_window"])
            state.progress = Progress(**saved["progress"])
            state.best = tensors.get("best")
        except (KeyError, TypeError, ValueError, RuntimeError, KernelMathError) as error:
            raise CheckpointInvalid(f"{loaded.name}: its parts do not fit together ({error})") from error
        return state

    def check_invariants(self) -> None:
        """Weights are finite, the window and the optimizer are sound, and the best weights fit the network."""
        self.phi_window.check_invariants()
        self.optimizer.check_invariants()
        assert all(bool(torch.isfinite(p).all()) for p in self.kernel.parameters())
        assert self.best is None or self.best.keys() == self.ema.shadow.state_dict().keys()
        assert (self.progress.best_loss is None) == (self.best is None)


def _in_range(name: str, value: object) -> int | float:
    """A training option of the right kind and size. Raises ``InvalidRequest``."""
    low, high = _TUNABLE[name]
    number = not isinstance(value, bool) and isinstance(value, int if isinstance(low, int) else (int, float))
    if not number or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if isinstance(low, int) else "a number"
        raise InvalidRequest(f"config: {name} must be {kind} from {low} to {high}, got {value!r}")
    return value  # type: ignore[return-value]


def kernel_with(plan: KernelPlan, weights: dict[str, Tensor]) -> M8Kernel:
    """A kernel in eval mode with a copy of ``weights``; nobody trains it. Raises ``CheckpointInvalid``."""
    kernel = M8Kernel(plan.network)
    try:
        kernel.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointInvalid(f"the weights do not fit the network: {error}") from None
    return kernel.eval().requires_grad_(False)


def _optimizer_state(saved: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in saved["scalars"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = [{**group, "betas": tuple(group["betas"])} for group in saved["groups"]]
    return {"state": state, "param_groups": groups}
