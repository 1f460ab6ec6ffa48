"""The tokenizer's files of an export with new tokens: every reader finds them, and nothing else has changed."""

import json

import pytest
import transformers
from tiny_models import make_tiny_tokenizer

from postrain.config import NewTokensSection
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.hf.folders import copy_side_files


@pytest.mark.parametrize("special", [False, True])
def test_all_files_name_the_new_tokens(tmp_path, special):
    source, folder = make_tiny_tokenizer(tmp_path / "source"), tmp_path / "out"
    raw = json.loads((source / "tokenizer_config.json").read_text())
    own = json.loads((source / "tokenizer.json").read_text())
    own |= {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in own["added_tokens"]}
    (source / "tokenizer.json").write_text(json.dumps(own))
    (source / "tokenizer_config.json").write_text(json.dumps(raw | {"added_tokens_decoder": decoder}))
    (source / "added_tokens.json").write_text(json.dumps({"<|pad|>": 3}))
    folder.mkdir()
    tokenizer = load_tokenizer(source, new_tokens=NewTokensSection(("<a>", "<b>"), special=special))
    copy_side_files(source, folder, tokenizer)

    written = json.loads((folder / "tokenizer.json").read_text())
    assert written | {"added_tokens": written["added_tokens"][:-2]} == own
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<|pad|>": 3, "<a>": 260, "<b>": 261}
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert (decoder["261"]["content"], decoder["261"]["special"], len(decoder)) == ("<b>", special, 6)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert theirs.encode("x<b>", add_special_tokens=False)[-1:] == ours.encode_text("x<b>")[-1:] == [261]
    assert theirs.decode([260, 261], skip_special_tokens=True) == ("" if special else "<a><b>")
    assert ours.fast.to_str() == tokenizer.fast.to_str()
