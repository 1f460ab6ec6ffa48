"""docs/models.md says what the tables of the code say."""

import pathlib
import re

from postrain.hf.families import FAMILIES, TEXT_PARTS
from postrain.hf.gguf.convert import ARCHITECTURES
from postrain.hf.gguf.tokenizer import BYTE_LEVEL_RULES

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_every_family_and_every_import_is_listed():
    listed, measured = PAGE.split("<!-- families -->")
    rows_of = lambda text: [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| `\w+ForCausalLM`", line)
    ]
    assert [row[0].strip("`") for row in rows_of(listed)] == list(FAMILIES)
    assert all(f"`{name}`" in listed for name in TEXT_PARTS)
    assert {row[0].strip("`") for row in rows_of(measured)} == set(FAMILIES)
    imports = {row[2].strip("`"): row[0].strip("`") for row in rows_of(listed) if row[2]}
    assert imports == {name: architecture.name for name, architecture in ARCHITECTURES.items()}


def test_every_pre_tokenizer_is_listed():
    listed = re.search("with the pre-tokenizer\n(.*?), or SentencePiece", PAGE, re.DOTALL)[1]
    assert set(re.findall("`(.*?)`", listed)) == set(BYTE_LEVEL_RULES)
