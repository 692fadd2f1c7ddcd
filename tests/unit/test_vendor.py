"""Vendored files are the published ones, and what the pages load stays small and on this origin."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "static"
VENDOR = STATIC / "vendor"
ROW = re.compile(r"^\| (\S+) \| .+ \| (\S+) \| (\S+) \| ([0-9a-f]{64}) \|$", re.MULTILINE)
LISTED = {name: (version, sha256) for name, version, _, sha256 in ROW.findall((VENDOR / "VENDOR.md").read_text())}
OWN_FILES = sorted(path for path in STATIC.rglob("*") if path.suffix in (".js", ".css") and VENDOR not in path.parents)
TEMPLATES = sorted((ROOT / "templates").glob("*.html"))
#: Gzipped, everything a page could load at once; the budget of the dashboard is 150 KB.
FIRST_LOAD_BUDGET = 150_000


def test_every_vendored_file_is_listed():
    files = {path.name for path in VENDOR.iterdir()} - {"VENDOR.md"}
    assert files == set(LISTED)


@pytest.mark.parametrize("name", sorted(LISTED))
def test_hash_and_version(name):
    version, sha256 = LISTED[name]
    assert version in name
    assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == sha256


def test_first_load_is_small():
    everything = [*OWN_FILES, *VENDOR.glob("*.js"), *VENDOR.glob("*.css")]
    total = sum(len(gzip.compress(path.read_bytes())) for path in everything)
    assert total < FIRST_LOAD_BUDGET


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.name)
def test_modules_are_short_and_never_parse_html(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


@pytest.mark.parametrize("path", [*OWN_FILES, *TEMPLATES], ids=lambda path: path.name)
def test_no_other_origin_is_named(path):
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", path.read_text()))
    assert addresses <= {"http://www.w3.org"}  # the SVG namespace, which is a name and not fetched


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_have_nothing_inline(path):
    text = path.read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:|\|\s*safe\b", text)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))


def test_imports_resolve():
    for path in OWN_FILES:
        for target in re.findall(r'from "(\./[^"]+)"', path.read_text()):
            assert (path.parent / target).is_file(), f"{path.name} imports {target}"
