"""Imports of torch and transformers, one thread at a time.

transformers resolves its names lazily, and two threads that do so at once can find a module half made ("cannot import
name 'Cache'"): seen when a model and an embedding were opened at the start of a server that had lived before.
Whoever imports these libraries in a thread of its own calls this first.
"""

from __future__ import annotations

import threading

_IMPORTING = threading.Lock()


def import_models() -> None:
    """Import what language models and embeddings are made with; returns when it is all there. Quick the second time."""
    with _IMPORTING:
        import torch  # noqa: F401
        from transformers import (  # noqa: F401
            AutoModelForCausalLM,
            AutoTokenizer,
            BertConfig,
            BertModel,
            Cache,
            DynamicCache,
        )

        import workspace.engine
        import workspace.models
        import workspace.packaged  # noqa: F401
