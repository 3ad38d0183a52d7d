"""What the processes load, and where they meet."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from l4jax.checkpoints.convert import convert
from tests.text import small
from tests.tiny import llama3_like, save, shallow

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Two layers of a small Scout, one with RoPE and one without: each process compiles its programs for itself."""
    folder = tmp_path_factory.mktemp("many")
    config = json.loads((GOLDEN / "scout" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "moe_layers": [0, 1], **{name: config[name][2:4] for name in ("no_rope_layers", "layer_types")}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / "scout" / "model.safetensors")
    kept = {re.sub(r"layers\.([23])\.", lambda layer: f"layers.{int(layer[1]) - 2}.", name): name for name in tensors}
    save_file({new: tensors[old] for new, old in kept.items() if new != old or "layers." not in old}, folder / "model.safetensors")
    convert(folder, folder / "scout")
    shutil.copytree(folder / "scout", folder / "scout_other")
    manifest = folder / "scout_other" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"source_format": "', '"source_format": "another '))
    return folder / "scout"


@pytest.fixture(scope="session")
def talking(tmp_path_factory):
    """A shallow dense model with a tokenizer."""
    tokenizer = small.backend()
    config = shallow(llama3_like(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512))
    return save(tmp_path_factory.mktemp("talking"), config, {"tokenizer.json": tokenizer.to_str()})


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
