"""docs/models.md says what the tables of the code say."""

import pathlib
import re

from postrain.hf.families import FAMILIES
from postrain.hf.gguf import ARCHITECTURES
from postrain.hf.gguf_tokenizer import BYTE_LEVEL_RULES

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_every_family_and_every_import_is_listed():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if "ForCausalLM" in line
    ]
    assert {row[0].strip("`") for row in rows if "not yet" not in row[1]} == set(FAMILIES)
    imports = {re.match("`(.*?)`", row[2])[1]: row[0].strip("`") for row in rows}
    assert imports == {name: architecture.name for name, architecture in ARCHITECTURES.items()}


def test_every_pre_tokenizer_is_listed():
    listed = re.search("with the pre-tokenizer\n(.*?), or SentencePiece", PAGE, re.DOTALL)[1]
    assert set(re.findall("`(.*?)`", listed)) == set(BYTE_LEVEL_RULES)
