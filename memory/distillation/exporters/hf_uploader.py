"""A run's dataset, or a cartridge, on the Hugging Face hub: one commit, private unless asked otherwise.

Optional: ``huggingface_hub`` is imported only here and only when something is uploaded. The token is the library's own
(``HF_TOKEN``, or what its login stored); it is never written or logged by us.

A dataset that was made without redaction is not uploaded unless that is asked for as well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from memory.distillation.config import DistillConfig
from memory.distillation.errors import ExporterMissing, ExportError
from memory.distillation.exporters.local import export_local
from storage import files

_CARD = """---
tags: [olympus, cartridge, distillation]
configs:
- config_name: default
  data_files: data/*.parquet
---
Rows for training a cartridge (a trained KV prefix), in the schema of the Cartridges library: `messages`,
`system_prompt`, `metadata`, `type`. Made by Olympus; `data_report.json` has the counts, also of what was redacted.
"""


class HubUploader:
    """See the module docstring. ``api`` is a ``huggingface_hub.HfApi`` or behaves like one."""

    def __init__(self, api: Any = None):
        self._api = _default_api() if api is None else api

    def upload_run(
        self, folder: Path, config: DistillConfig, *, private: bool = True, allow_unredacted: bool = False
    ) -> str:
        """Upload a run's artifacts to the data set repository ``config.hf_repo_id``; returns its address.

        Raises ``ExportError``; the run's folder is not changed.
        """
        if config.hf_repo_id is None:
            raise ExportError("no repository is configured; set hf_repo_id: owner/name")
        if not config.data.redact.enabled and not allow_unredacted:
            raise ExportError(
                "data.redact.enabled is false, so the dataset may hold personal data; make it with redaction, "
                "or say that it may be uploaded as it is (allow_unredacted)"
            )
        with tempfile.TemporaryDirectory(prefix="olympus-export-") as scratch:
            staged = Path(scratch) / "run"
            export_local(folder, staged)
            files.write_bytes(staged / "README.md", _CARD.encode())
            return self._upload(staged, config.hf_repo_id, "dataset", private, f"Dataset of {folder.name}")

    def upload_cartridge(self, folder: Path, repo_id: str, *, private: bool = True) -> str:
        """Upload a cartridge's folder (native or any exported form) as a model repository; returns its address."""
        if not folder.is_dir() or not any(folder.iterdir()):
            raise ExportError(f"{folder} holds no cartridge; export one there first")
        return self._upload(folder, repo_id, "model", private, f"Cartridge {folder.name}")

    def _upload(
        self, folder: Path, repo_id: str, kind: Literal["dataset", "model"], private: bool, message: str
    ) -> str:
        try:
            address = self._api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
            self._api.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                repo_type=kind,
                commit_message=message,
                ignore_patterns=[f"{files.PARTIAL_PREFIX}*"],
            )
        except Exception as error:  # whatever the library and its transport raise: nothing of ours has changed
            raise ExportError(
                f"the hub did not take {repo_id}: {type(error).__name__}: {error}; "
                "check the token's rights and the connection, then export again"
            ) from error
        return str(address)


def _default_api() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ExporterMissing(
            "uploading to the hub needs the package huggingface_hub; install it, or export to a folder instead"
        ) from None
    token = huggingface_hub.get_token()
    if token is None:
        raise ExporterMissing("no token for the hub; set HF_TOKEN, or log in with the hub's own command line")
    return huggingface_hub.HfApi(token=token)
