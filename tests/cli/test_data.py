"""Training data: every form from every kind of source, the tokens that the loss is on, and what is refused."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval_mamba.cli.data import DataError, TrainingData, load_data, prepare_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import peft_mamba.embedded

MINI = Path(peft_mamba.embedded.__file__).parent / "mini"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The rows that `datasets` keeps are not those of another run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["mini", "bytes"])
def tokenizer(request, tiny):
    """A base model's: without a chat template, and (bytes) without a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(MINI if request.param == "mini" else tiny["mamba"])
    tokenizer.chat_template = None
    return tokenizer


CHAT = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why"), ("assistant", "So.")]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]
SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
ROWS = {
    "alpaca": {"instruction": "Add.", "input": "1 + 1", "output": "2", "text": "not this"},
    "sharegpt": {"conversations": [{"from": SHAREGPT_ROLES[r], "value": c} for r, c in CHAT]},
    "lima": {"conversations": [content for _, content in CHAT[1:]]},
    "messages": {"messages": MESSAGES},
    "prompt-completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "prompt-completion, messages": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]},
    "text": {"text": "Once upon a time."},
}
INPUT = "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n"
TURN = "### Instruction:\n{}\n\n### Response:\n{}<|endoftext|>"
TURNS = TURN.format("Hi", "Yes?") + "\n\n" + TURN.format("Why", "So.")
# What is trained on, whole, and the parts of it in the loss.
TRAINED = {
    "alpaca": (INPUT + "2<|endoftext|>", "2<|endoftext|>"),
    "sharegpt": ("Be kind.\n\n" + TURNS, "Yes?<|endoftext|>So.<|endoftext|>"),
    "lima": (TURNS, "Yes?<|endoftext|>So.<|endoftext|>"),
    "messages": ("Be kind.\n\n" + TURNS, "Yes?<|endoftext|>So.<|endoftext|>"),
    "prompt-completion": ("1 + 1 = 2<|endoftext|>", " 2<|endoftext|>"),
    "prompt-completion, messages": (
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes?<|endoftext|>",
        "Yes?<|endoftext|>",
    ),
    "text": ("Once upon a time.<|endoftext|>", "Once upon a time.<|endoftext|>"),
}


def written(path: Path, rows: list[dict]) -> str:
    """A file of `rows`, of the kind that its suffix says."""
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trainer(data: TrainingData, tokenizer, tmp_path: Path) -> SFTTrainer:
    model = AutoModelForCausalLM.from_pretrained(MINI)
    args = SFTConfig(tmp_path / "out", bf16=False, use_cpu=True, report_to="none", **data.loss)
    return SFTTrainer(model, args, train_dataset=data.train, processing_class=tokenizer)


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("case", ROWS)
def test_the_loss_is_on_the_tokens_that_were_asked_for(case, loss_on, tokenizer, tmp_path):
    data = load_data(written(tmp_path / "rows.jsonl", [ROWS[case]] * 2), loss_on=loss_on)
    assert data.form == ("sharegpt" if case == "lima" else case.split(",")[0])
    prepare_tokenizer(tokenizer, data.form, loss_on)
    row = trainer(data, tokenizer, tmp_path).train_dataset[1]
    whole, response = TRAINED[case]
    assert tokenizer.decode(row["input_ids"]) == whole
    in_loss = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(in_loss) == (response if loss_on == "response" else whole)
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_padding_hides_no_end_of_text(tokenizer, tmp_path):
    """Although it may be the same token."""
    size = len(tokenizer)
    rows = [{"instruction": "Hi", "output": "short"}, {"instruction": "Hi", "output": "a much longer response"}]
    data = load_data(written(tmp_path / "rows.jsonl", rows))
    prepare_tokenizer(tokenizer, data.form)
    made = trainer(data, tokenizer, tmp_path)
    batch = made.data_collator([made.train_dataset[0], made.train_dataset[1]])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    padded = batch["attention_mask"][0] == 0
    assert padded.any() and (batch["labels"][0][padded] == -100).all()
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    assert len(tokenizer) == size


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_each_kind(suffix, tmp_path):
    rows = [{"instruction": "Add.", "input": "", "output": "007"}, {"instruction": "NA", "input": "x", "output": "NA"}]
    source = written(tmp_path / f"rows.{suffix}", rows)
    data = load_data(source)
    assert (data.form, data.source, data.evaluation) == ("alpaca", source, None)
    assert [row["content"] for (row,) in data.train["prompt"]] == ["Add.", "NA\n\n### Input:\nx"]
    assert [row["content"] for (row,) in data.train["completion"]] == ["007", "NA"]


def test_directories(tmp_path):
    train, test = [[{"prompt": f"{part} {i}", "completion": "x"} for i in range(4)] for part in ("train", "test")]
    (tmp_path / "files").mkdir()
    written(tmp_path / "files" / "train.jsonl", train)
    written(tmp_path / "files" / "test.parquet", test)
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test))
    splits.save_to_disk(tmp_path / "saved")
    for name in ("files", "saved"):
        data = load_data(str(tmp_path / name), eval_split="test[:50%]")
        assert data.train["prompt"] == [row["prompt"] for row in train]
        assert data.evaluation["prompt"] == ["test 0", "test 1"]
    splits["test"].save_to_disk(tmp_path / "one")
    assert load_data(str(tmp_path / "one")).train["prompt"] == [row["prompt"] for row in test]
    (tmp_path / "clone").mkdir()
    written(tmp_path / "clone" / "a.jsonl", train)
    written(tmp_path / "clone" / "b.jsonl", test)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "clone" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    assert load_data(str(tmp_path / "clone"), name="b").train["prompt"] == [row["prompt"] for row in test]
    with pytest.raises(DataError, match="Config name is missing"):
        load_data(str(tmp_path / "clone"))


def test_files_of_a_directory_that_name_no_split_are_said_to_be_unused(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    written(Path("data/train.jsonl"), [{"text": "x"}])
    assert load_data("data").train["text"] == ["x"]
    assert "not used" not in caplog.text
    written(Path("data/more.jsonl"), [{"text": "y"}])
    assert load_data("data").train["text"] == ["x"]
    assert "not used, for want of a split in their names: " in caplog.text and "more.jsonl" in caplog.text


def test_a_changed_file_is_read_again(tmp_path):
    for text in ("one", "two"):
        assert load_data(written(tmp_path / "rows.jsonl", [{"text": text}])).train["text"] == [text]


def test_a_share_is_held_out_and_never_trained_on(tmp_path):
    source = written(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(100)])
    data = load_data(source, eval_split="0.07")
    assert (len(data.train), len(data.evaluation)) == (93, 7)
    assert sorted(map(int, [*data.train["text"], *data.evaluation["text"]])) == list(range(100))
    assert load_data(source, eval_split="0.07").fingerprint == data.fingerprint
    assert load_data(source, eval_split="0.07", seed=1).evaluation["text"] != data.evaluation["text"]


def test_rows_evaluated_and_trained_on_are_counted(tmp_path, caplog):
    source = written(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(10)])
    load_data(source, split="train[:6]", eval_split="train[6:]")
    assert "also trained on" not in caplog.text
    load_data(source, split="train[:6]", eval_split="train[4:]")
    assert "2 of 6 evaluation rows are also trained on" in caplog.text


def test_rows_without_a_response_are_dropped_and_counted(tmp_path, caplog):
    """Alpaca's empty outputs, LIMA's questions without an answer, wikitext's empty lines; not in the other forms."""
    cases = [
        [{"instruction": "Say nothing.", "output": ""}, {"instruction": "Hi", "output": "Hi"}],
        [{"conversations": ["Why?"]}, {"conversations": ["Why?", "So."]}],
        [{"text": ""}, {"text": "x"}],
    ]
    for rows in cases:
        caplog.clear()
        assert len(load_data(written(tmp_path / "rows.jsonl", rows)).train) == 1
        assert "1 of 2 rows have no response" in caplog.text
        with pytest.raises(DataError, match="none of the 1 rows"):
            load_data(written(tmp_path / "rows.jsonl", rows[:1]))


def conversation(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD_ROWS = {
    "roles out of order": (conversation("user", "user"), "message 1 .* where the assistant has to speak"),
    "begins with the assistant": (conversation("assistant", "user"), "message 0 .* where the user has to speak"),
    "late system": (conversation("user", "assistant", "system"), "message 2 is of the role 'system'"),
    "unknown role": (conversation("tool"), "role 'tool', expected one of system, user, human"),
    "no response": (conversation("user"), "no message of the assistant"),
    "no messages": ({"messages": []}, r"conversation is \[\]"),
    "none": ({"messages": None}, "conversation is None"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, r"message 0 \(user\) is None"),
    "empty content": ({"messages": [{"role": "user", "content": " "}]}, r"message 0 \(user\) is empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_conversation_is_named_by_its_row(case, tmp_path):
    row, message = BAD_ROWS[case]
    source = written(tmp_path / "rows.parquet", [conversation("user", "assistant"), row])
    with pytest.raises(DataError, match=rf"rows.parquet, split 'train', row 1: .*{message}.*\. Correct"):
        load_data(source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi", "output": None}, "output is None, expected a string"),
        ({"instruction": "Hi", "output": 4}, "output is 4, expected a string"),
        ({"instruction": " ", "output": "x"}, "instruction is empty"),
        ({"prompt": "Hi", "completion": ""}, "completion is empty"),
        ({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, "completion begin with the assistant"),
        ({"prompt": MESSAGES[:2], "completion": "Yes?"}, "the completion is not"),
        ({"text": 3}, "text is 3"),
    ],
)
def test_other_bad_rows(row, message, tmp_path):
    with pytest.raises(DataError, match=f"row 0: .*{message}"):
        load_data(written(tmp_path / "rows.jsonl", [row]))


def test_unknown_columns_are_named_with_the_forms_there_are(tmp_path):
    with pytest.raises(DataError, match="columns question, answer, .*alpaca: instruction, output; messages: messages"):
        load_data(written(tmp_path / "rows.jsonl", [{"question": "x", "answer": "y"}]))


def refusals(directory: Path) -> dict[str, tuple[dict, str]]:
    """What is wrong to the arguments and the message's beginning."""
    rows = written(directory / "rows.jsonl", [{"text": "x"}, {"text": "y"}])
    (directory / "empty.jsonl").write_text("", encoding="utf-8")
    (directory / "broken.json").write_text('{"text": ', encoding="utf-8")
    (directory / "notes.md").write_text("text", encoding="utf-8")
    (directory / "nothing").mkdir()
    (directory / "mixed").mkdir()
    for name in ("train.jsonl", "train_2.parquet"):
        written(directory / "mixed" / name, [{"text": "x"}])
    return {
        "no such file": ({"source": "data.csv"}, "data.csv is a local path, and nothing is there"),
        "no such directory": ({"source": "./tatsu-lab/alpaca"}, r"\./tatsu-lab/alpaca is a local path"),
        "another kind of file": ({"source": str(directory / "notes.md")}, ".*suffix '.md'; expected .*.jsonl, .json"),
        "an empty file": ({"source": str(directory / "empty.jsonl")}, ".*empty.jsonl"),
        "broken JSON": ({"source": str(directory / "broken.json")}, ".*broken.json cannot be read as json"),
        "an empty directory": ({"source": str(directory / "nothing")}, ".*holds no data"),
        "two kinds in a split": ({"source": str(directory / "mixed")}, ".*one split in json and parquet files"),
        "a revision of a file": ({"source": rows, "revision": "v1"}, ".*has no revision to choose"),
        "a name of the embedded set": ({"source": None, "name": "x"}, "the embedded .* has no name to choose"),
        "no such split": ({"source": rows, "split": "test"}, r".*no split 'test'; it has train \(2 rows\)"),
        "no such split to evaluate": ({"source": rows, "eval_split": "dev"}, ".*no split 'dev'"),
        "no split": ({"source": rows, "split": "train[a:]"}, r".*no split 'train\[a:\]'"),
        "no rows": ({"source": rows, "split": "train[2:]"}, r"the split 'train\[2:\]' of .* has no rows"),
        "all held out": ({"source": rows, "eval_split": "0.9"}, ".*leaves none to train on"),
        "more than all held out": ({"source": rows, "eval_split": "5"}, ".*between 0 and 1, not 5"),
        "an unknown loss": ({"source": rows, "loss_on": "prompt"}, "the loss can be on 'response' or 'all'"),
    }


def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for case, (arguments, message) in refusals(tmp_path).items():
        with pytest.raises(DataError, match=message):
            load_data(**arguments)
            pytest.fail(f"not refused: {case}")


def test_a_hub_dataset_that_is_out_of_reach_is_named_with_the_remedy():
    with pytest.raises(DataError, match="tatsu-lab/alpaca .*HF_HUB_OFFLINE .*Unset it.*embedded .* needs no network"):
        load_data("tatsu-lab/alpaca")


def test_splits_of_two_forms_are_refused(tmp_path):
    written(tmp_path / "train.jsonl", [{"text": "x"}])
    written(tmp_path / "test.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(DataError, match="the form 'text', split 'test' 'prompt-completion'"):
        load_data(str(tmp_path), eval_split="test")


def test_the_embedded_set_is_what_is_taken_without_a_name():
    data = load_data(None)
    assert (data.form, data.source, len(data.train), len(data.evaluation)) == ("alpaca", "embedded", 1200, 204)
    assert data.loss == {"completion_only_loss": True, "assistant_only_loss": False}
    assert load_data("embedded", split="heldout").evaluation is None


def test_the_fingerprint_is_of_the_rows(tmp_path):
    rows = [ROWS["alpaca"], {**ROWS["alpaca"], "output": "3"}]
    prints = [
        load_data(written(tmp_path / name, part)).fingerprint
        for name, part in [("a.jsonl", rows), ("b.parquet", rows), ("c.jsonl", rows[::-1]), ("d.jsonl", rows[:1])]
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert load_data(str(tmp_path / "a.jsonl"), split="train[:1]", eval_split="train[1:]").fingerprint not in prints
    assert prints[0] == "0485b5ae9b4f557d", "the same in any process"


def test_a_tokenizer_keeps_what_it_has(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["mamba"])
    template, tokenizer.pad_token = tokenizer.chat_template, "!"
    assert prepare_tokenizer(tokenizer, "alpaca") is tokenizer
    assert (tokenizer.chat_template, tokenizer.pad_token) == (template, "!")
    assert (tokenizer.preparation.pad_token, tokenizer.preparation.chat_template) == (None, None)


def test_a_template_without_marks_is_refused_only_where_they_are_needed(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["mamba"])
    with pytest.raises(DataError, match="does not mark the responses .* loss_on='all'"):
        prepare_tokenizer(tokenizer, "messages")
    prepare_tokenizer(tokenizer, "messages", "all")
    prepare_tokenizer(tokenizer, "alpaca")


def test_a_template_that_trl_can_mark_is_accepted(tiny):
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = AutoTokenizer.from_pretrained(tiny["mamba"])
    tokenizer.chat_template = qwen2_5_chat_template
    assert prepare_tokenizer(tokenizer, "messages").chat_template == qwen2_5_chat_template


def test_a_spare_token_is_the_padding_and_the_vocabulary_stays(tiny):
    """As in GPT-NeoX's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny["mamba"])
    tokenizer.add_tokens("<|padding|>", special_tokens=True)
    size = len(tokenizer)
    prepare_tokenizer(tokenizer, "text")
    assert tokenizer.pad_token == tokenizer.preparation.pad_token == "<|padding|>"
    assert len(tokenizer) == size


def test_a_tokenizer_without_an_end_is_refused(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["mamba"])
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare_tokenizer(tokenizer, "text")


def test_what_was_set_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    prepare_tokenizer(tokenizer, "messages").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template and again.pad_token == tokenizer.pad_token
    assert again.apply_chat_template(MESSAGES, tokenize=False) == TRAINED["messages"][0]


def test_plain_text_gets_no_chat_template(tokenizer):
    assert prepare_tokenizer(tokenizer, "text").chat_template is None


SAID = st.text(min_size=1, max_size=12) | st.sampled_from(["\n\n a", " x \n", "\n", "### Response:\n"])


@settings(deadline=None, max_examples=60)
@given(messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), SAID), max_size=6))
def test_any_conversation_is_rendered_or_refused(prepared, messages):
    """Rendered: whole in the text, each prompt's tokens the first of the conversation's, every response in the loss."""
    from lm_eval_mamba.cli.forms import READERS

    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    turns = "".join(role[0] for role, _ in messages)
    in_order = turns.removeprefix("s").startswith("ua") and not any(x in turns[1:] for x in ("uu", "aa", "s"))
    empty = any(not content.strip() for role, content in messages if role != "system")
    try:
        checked = READERS["messages"](row)["messages"]
    except DataError:
        assert not in_order or empty
        return
    assert in_order and not empty
    for tokenizer in prepared:
        ids, masks = render(tokenizer, checked)
        said = [message["content"].strip() + "<|endoftext|>" for message in checked if message["role"] == "assistant"]
        assert tokenizer.decode([i for i, mask in zip(ids, masks, strict=True) if mask]) == "".join(said)
        for place, message in enumerate(checked):
            if message["role"] == "user":
                prompt = tokenizer.apply_chat_template(checked[: place + 1], add_generation_prompt=True)["input_ids"]
                follows = place + 1 < len(checked)
                assert ids[: len(prompt)] == prompt if follows else prompt[: len(ids)] == ids


@pytest.fixture(scope="module")
def prepared(tiny):
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (MINI, tiny["mamba"])]
    for tokenizer in tokenizers:
        tokenizer.chat_template = None
        prepare_tokenizer(tokenizer, "messages")
    return tokenizers


def render(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], made["assistant_masks"]
