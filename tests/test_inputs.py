"""Text and video in one row: the same logits as the model's own forward, with pruning, padding and branches; what is
refused.

Shapes: B rows, S positions, T frames, D width, V vocabulary.
"""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core import record_of, video_of
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError
from rlaif_lite.model.inputs import CLOSING, Batch, Sequence, branch, collate, encode_prompt, split_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.model.text import RUNNING, decode_answer, encode_answer
from rlaif_lite.recipe import Lora
from rlaif_lite.video.cache import FeatureRecord


def user(text: str) -> list[Message]:
    return [Message("user", text)]


def words(base, ids) -> list[str]:
    return base.tokenizer.convert_ids_to_tokens(list(ids))


def ids(base, text: str) -> list[int]:
    return base.tokenizer.convert_tokens_to_ids(text.split())


def plain(ids: list[int]) -> Sequence:
    """A row of text."""
    return Sequence(ids, torch.arange(len(ids))[None], None, torch.tensor([len(ids)]))


def places(row: Sequence) -> tuple[list[int], int]:
    """Positions of a row of one channel, and the one that follows."""
    (positions,), (following,) = row.position_CS.tolist(), row.next_position_C.tolist()
    return positions, following


def hidden(base, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), Roles(base, Lora()).use("base") as role:
        return role.hidden(batch)


def alone(base, row: Sequence) -> torch.Tensor:
    return hidden(base, collate(base, [row]))[0]


# ---- the same numbers as the model's own forward


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cached_features_give_the_models_own_logits(load, quantization):
    """Pixels through `AutoModelForImageTextToText`, against features that were encoded before: two videos of
    different lengths."""
    base = load(quantization=quantization, tower=True)
    questions = ("<video> describe the video", "what is true ? <video> describe the clip")
    rows, theirs = [], []
    for seed, (frames, question) in enumerate(zip((6, 3), questions, strict=True)):
        pixels_TCHW = torch.randn(frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        features_TPD = base.encode(pixels_TCHW).features_LGPD[0]
        count = features_TPD.shape[0] * features_TPD.shape[1]
        record = record_of(features_TPD.flatten(0, 1), count, list(range(count)))
        rows.append(encode_prompt(base, user(question), record))
        assert rows[-1].ids_S.count(base.placeholder_id) == 4 * frames
        with torch.no_grad():
            output = base.model(
                input_ids=torch.tensor([rows[-1].ids_S]),
                pixel_values_videos=pixels_TCHW[None],
                attention_mask=torch.ones(1, len(rows[-1].ids_S), dtype=torch.long),
            )
        theirs.append(output.logits[0])
    for row, want_SV in zip(rows, theirs, strict=True):
        assert (alone(base, row) @ base.head_weight_VD.T - want_SV).abs().max() <= 1e-5
    together_BSD = hidden(base, collate(base, rows))
    for hidden_SD, row, want_SV in zip(together_BSD, rows, theirs, strict=True):
        assert (hidden_SD[: len(row.ids_S)] @ base.head_weight_VD.T - want_SV).abs().max() <= 1e-5


def test_pruned_rows_are_the_full_row_with_keys_masked(base):
    """Kept tokens stand where they stood: 9 of 24 in the one row, 2 of 12 in the other."""
    cases = [(24, [0, 1, 2, 3, 7, 8, 15, 22, 23], 1), (12, [5, 11], 2)]
    for layout, keep, seed in cases:
        full = encode_prompt(base, user("what <video> describe the video"), video_of(base, layout=layout, seed=seed))
        pruned = encode_prompt(
            base, user("what <video> describe the video"), video_of(base, layout=layout, keep=keep, seed=seed)
        )
        start = full.ids_S.index(base.placeholder_id)
        kept_S = torch.ones(len(full.ids_S), dtype=torch.bool)
        kept_S[start : start + layout] = False
        kept_S[[start + k for k in keep]] = True
        batch = collate(base, [full])
        want_SD = hidden(base, batch._replace(attention=kept_S[None]))[0][kept_S]
        got_SD = alone(base, pruned)
        assert got_SD.shape == want_SD.shape and (got_SD - want_SD).abs().max() <= 1e-5
        assert torch.equal(pruned.next_position_C, full.next_position_C)
        renumbered = pruned._replace(position_CS=torch.arange(len(pruned.ids_S))[None])
        assert (alone(base, renumbered) - want_SD).abs().max() > 1e-2  # positions matter here


def test_positions_of_a_pruned_video_by_hand(base):
    """<s> what [2 3 4 5 of the layout, 3 and 5 kept] describe <ans>: the text after the video goes on at 2 + 4."""
    row = encode_prompt(base, user("what <video> describe"), video_of(base, layout=4, keep=[1, 3]))
    assert words(base, row.ids_S) == ["<s>", "what", "<video>", "<video>", "describe", "<ans>"]
    assert places(row) == ([0, 1, 3, 5, 6, 7], 8)
    longer = row.extend(ids(base, "red ."))
    assert places(longer) == ([0, 1, 3, 5, 6, 7, 8, 9], 10)
    assert places(row) == ([0, 1, 3, 5, 6, 7], 8)  # the row itself is as it was


def test_padding_on_the_right_changes_nothing(base):
    rows = [
        encode_prompt(base, user(text), video)
        for text, video in (
            ("<video> describe", video_of(base, 4)),
            ("what is true ? what is true ? star", None),
            ("<video> what is the colour first ?", video_of(base, 16, seed=3)),
        )
    ]
    together_BSD = hidden(base, collate(base, rows, length=40))
    for hidden_SD, row in zip(together_BSD, rows, strict=True):
        assert (hidden_SD[: len(row.ids_S)] - alone(base, row)).abs().max() <= 1e-5


def test_each_row_gets_its_own_video(base):
    """Rows with and without a video in any order: features are filled in by row."""
    texts = ["<video> describe", "what is true ?", "star <video> describe"]
    videos = [video_of(base, 8, seed=1), None, video_of(base, 4, seed=2)]
    rows = [encode_prompt(base, user(text), video) for text, video in zip(texts, videos, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        embeds_BSD = collate(base, [rows[i] for i in order]).embed(base)
        for embeds_SD, i in zip(embeds_BSD, order, strict=True):
            place_S = torch.tensor(rows[i].ids_S) == base.placeholder_id
            found_KD = embeds_SD[: len(place_S)][place_S]
            assert torch.equal(found_KD, videos[i].features_KD if videos[i] else found_KD[:0])
            text_S = torch.tensor(rows[i].ids_S)[~place_S]
            assert torch.equal(embeds_SD[: len(place_S)][~place_S], base.model.get_input_embeddings()(text_S))


# ---- branches


def branched(base) -> tuple[Sequence, list[list[int]], list[int]]:
    prefix = encode_prompt(base, user("<video> what is true ?"), video_of(base, layout=12, keep=[0, 4, 5, 11]))
    return (
        prefix,
        [ids(base, text) for text in ("first a red circle left", "star", "then a blue cross")],
        ids(base, "better ?"),
    )


def test_each_branch_is_as_if_it_stood_alone(base):
    prefix, branches, closing = branched(base)
    row = branch(prefix, branches, closing)
    other = encode_prompt(base, user("what is true ? describe the video"), None)  # a row without branches, padded
    together_BSD = hidden(base, collate(base, [row, other], length=40))
    start = len(prefix.ids_S)
    assert (together_BSD[0, :start] - alone(base, prefix)).abs().max() <= 1e-5
    for tokens in branches:
        want_SD = alone(base, prefix.extend(tokens))[-len(tokens) :]
        assert (together_BSD[0, start : start + len(tokens)] - want_SD).abs().max() <= 1e-5
        start += len(tokens)
    assert (together_BSD[1, : len(other.ids_S)] - alone(base, other)).abs().max() <= 1e-5


def test_the_closing_part_sees_every_branch(base):
    prefix, branches, closing = branched(base)
    last_D = alone(base, branch(prefix, branches, closing))[-1]
    for i in range(len(branches)):
        changed = [ids(base, "green") if j == i else tokens for j, tokens in enumerate(branches)]
        assert (alone(base, branch(prefix, changed, closing))[-1] - last_D).abs().max() > 1e-3
    # one branch is a plain sequence
    plain = alone(base, prefix.extend(branches[0] + closing))
    assert (alone(base, branch(prefix, branches[:1], closing)) - plain).abs().max() <= 1e-5


def test_branches_by_hand(base):
    """Prefix to position 3, branches of 2 and 3 tokens from there, closing from behind the longest; what is added
    sees all."""
    prefix = plain([1, 2, 3])
    row = branch(prefix, [[10, 11], [20, 21, 22]], [30])
    assert row.ids_S == [1, 2, 3, 10, 11, 20, 21, 22, 30]
    assert places(row) == ([0, 1, 2, 3, 4, 3, 4, 5, 6], 7)
    assert row.group_S == [0, 0, 0, 1, 1, 2, 2, 2, CLOSING]
    row = row.extend([40])
    assert places(row)[0][-1] == 7 and row.group_S[-1] == CLOSING
    attention = collate(base, [row, prefix]).attention
    assert all(stride % 8 == 0 for stride in attention.stride()[:-1])  # else a GPU copies it in every layer
    allowed = (attention == 0)[:, 0].int().tolist()
    assert allowed[0] == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert [row[:4] for row in allowed[1][:3]] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_marks_in_a_message_make_branches(base):
    row = encode_prompt(base, user("<video> what <|> red circle <|> blue <|> better ?"), video_of(base, 4))
    want = branch(
        encode_prompt_without_end(base, "<video> what", video_of(base, 4)),
        [ids(base, "red circle"), ids(base, "blue")],
        ids(base, "better ? <ans>"),
    )
    assert (row.ids_S, places(row), row.group_S) == (want.ids_S, places(want), want.group_S)
    split = split_prompt(base, "<video> what <|>", video_of(base, 4))
    assert words(base, split.prefix.ids_S) == ["<s>", *["<video>"] * 4, "what"]
    assert words(base, split.branch(base, "red")) == ["red", "<ans>"]


def encode_prompt_without_end(base, text: str, video: FeatureRecord) -> Sequence:
    row = encode_prompt(base, user(text), video)
    return Sequence(row.ids_S[:-1], row.position_CS[:, :-1], row.features_KD, row.next_position_C - 1)


# ---- text, answers, targets


def test_the_chat_template(base):
    turns = [
        Message("system", "what"),
        Message("user", "<video> describe the video"),
        Message("assistant", "red ."),
        Message("user", "star ?"),
    ]
    row = encode_prompt(base, turns, video_of(base, 2, layout=4, keep=[0, 1]))
    assert words(base, row.ids_S) == [
        "<s>",
        "what",
        "<video>",
        "<video>",
        "describe",
        "the",
        "video",
        "<ans>",
        "red",
        ".",
        "</s>",
        "star",
        "?",
        "<ans>",
    ]


def test_a_template_that_ends_in_a_newline_keeps_it(base):
    """ChatML opens the answer with a newline; without it a model is off its template, and nothing says so."""
    core = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<unk>", *"abcdef", "user", "assistant", "hi", "\n"])}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    chatml = copy.copy(base)
    chatml.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    chatml.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content[0].text }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    assert words(chatml, encode_prompt(chatml, user("hi"), None).ids_S) == ["user", "\n", "hi", "\n", "assistant", "\n"]
    tail = split_prompt(chatml, "hi<|>", None).branch(chatml, " hi")
    assert words(chatml, tail)[-2:] == ["assistant", "\n"]
    row = encode_prompt(chatml, user("hi <|> hi <|> hi <|> hi"), None)
    assert words(chatml, row.ids_S)[-2:] == ["assistant", "\n"]


@pytest.mark.parametrize(
    "text, given, says",
    [
        ("describe", True, "marks 0 videos .* and 1 was given"),
        ("<video> describe", False, "marks 1 videos .* and 0 was given"),
        ("<video> <video> describe", True, "marks 2 videos .* and 1 was given"),
    ],
)
def test_marks_and_features_must_agree(base, text, given, says):
    with pytest.raises(ModelError, match=says):
        encode_prompt(base, user(text), video_of(base) if given else None)


@pytest.mark.parametrize(
    "text",
    ["<video> what <|> a <video> <|> b <|> better ?", "<video> what <|> a <|> b <|> <video> better ?"],
    ids=["branch", "closing"],
)
def test_a_second_mark_in_a_branch_is_refused(base, text):
    with pytest.raises(ModelError, match="marks 2 videos"):
        encode_prompt(base, user(text), video_of(base))


def test_a_mark_in_an_answer_is_refused(base):
    with pytest.raises(ModelError, match="placeholder"):
        encode_answer(base, RUNNING, "a red <video> circle")


def test_answers_there_and_back(base):
    answer = encode_answer(base, RUNNING, "first a red circle left .")
    assert words(base, answer) == ["first", "a", "red", "circle", "left", ".", "</s>"]
    assert decode_answer(base, answer) == "first a red circle left ."
    assert decode_answer(base, answer[:-1]) == "first a red circle left ."  # cut by the length limit
    assert decode_answer(base, [base.eos_id]) == ""


def test_collate_by_hand(base):
    batch = collate(base, [plain([5, 6]), plain([4])], length=3)
    pad = base.tokenizer.pad_token_id
    assert batch.ids_BS.tolist() == [[5, 6, pad], [4, pad, pad]]
    assert batch.mask_BS.tolist() == [[True, True, False], [True, False, False]]
    assert batch.position_CBS.tolist() == [[[0, 1, 0], [0, 0, 0]]]
    assert batch.features == [] and batch.attention.tolist() == [[True] * 3] * 2  # no mask, see `collate`
