"""Sampling: greedy equals transformers' generate, samples follow the exact distribution and their own seeds, flags
are right.

Shapes: B rows, S positions, D width, V vocabulary, N drawn tokens.
"""

import math
from collections import Counter

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, Qwen2Config

from core import shake, video_of
from rlaif_kernels import linear_logprob
from rlaif_lite import rollout
from rlaif_lite.data.records import Message
from rlaif_lite.model.answers import Group, lay_out
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import Sequence, collate, encode_prompt
from rlaif_lite.model.roles import BASE, Roles
from rlaif_lite.recipe import Lora, Model
from rlaif_lite.rollout import Sampling, draw, sample, slot_bytes, slot_length
from rlaif_lite.rollout.dense import ATTENTION, dense_copy
from rlaif_lite.rollout.sampling import uniforms
from rlaif_lite.rollout.slots import SlotCache
from rlaif_lite.rollout.step import DecodeStep


def prompts_of(base) -> list[Sequence]:
    """Ragged: a pruned video, a whole one, and none."""
    given = [
        ("<video> describe the video", video_of(base, layout=12, keep=[0, 3, 4, 9])),
        ("what is the colour first ? what is true ?", None),
        ("<video> describe", video_of(base, 24, seed=5)),
        ("star", None),
        ("<video> what is the shape then ?", video_of(base, 4, seed=6)),
    ]
    return [encode_prompt(base, [Message("user", text)], video) for text, video in given]


@pytest.fixture
def policy(roles) -> Roles:
    roles.add("policy")
    shake(roles, "policy")
    return roles


@pytest.mark.parametrize(
    "slots, dense, graph", [(64, False, False), (64, True, True), (2, True, False), (2, False, True)]
)
def test_greedy_is_transformers_generate(policy, slots, dense, graph):
    """Token for token, from the same embeddings; `generate` pads on the left. On a CPU `graph` is the step that a GPU
    captures, over all slots, run eagerly."""
    base = policy.base
    prompts = prompts_of(base)
    embeds = [collate(base, [p]).embed(base)[0].flip(0) for p in prompts]
    banned = base.ban_bias_V.nonzero()[:, 0].tolist()
    with policy.use("policy") as role:
        got = sample(
            role,
            prompts,
            Sampling(12, temperature=0.0),
            seeds=[0] * len(prompts),
            batch_size=slots,
            dense=dense,
            graph=graph,
        )
        with torch.no_grad():
            want = base.model.generate(
                inputs_embeds=pad_sequence(embeds, batch_first=True).flip(1),
                attention_mask=pad_sequence(
                    [torch.ones(len(e), dtype=torch.long) for e in embeds], batch_first=True
                ).flip(1),
                position_ids=pad_sequence([p.position_CS[0].flip(0) for p in prompts], batch_first=True).flip(1),
                do_sample=False,
                max_new_tokens=12,
                suppress_tokens=banned,
                pad_token_id=base.tokenizer.pad_token_id,
                eos_token_id=base.eos_id,
            )
    for trajectory, row in zip(got, want.tolist(), strict=True):
        end = row.index(base.eos_id) + 1 if base.eos_id in row else len(row)
        assert trajectory.ids == row[:end]
    assert (
        len({tuple(t.ids) for t in got}) == len(prompts) and len({i for t in got for i in t.ids}) > 5
    )  # a real comparison


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sample_does_not_depend_on_its_batch(load, checkpointing):
    """Nor on what was trained in between: gradient checkpointing turns the cache of key and values off in training
    mode."""
    base = load(gradient_checkpointing=checkpointing)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    prompts = prompts_of(base)
    seeds = list(range(100, 100 + 3 * len(prompts)))
    sampling = Sampling(10, temperature=1.0)
    with roles.use("policy") as role:
        together = sample(role, prompts, sampling, seeds=seeds, per_prompt=3, batch_size=64)
    roles.trainable("policy")
    with roles.use("policy") as role:
        role.hidden(collate(base, prompts)).mean().backward()
    with roles.use("policy") as role:
        split = sample(role, prompts, sampling, seeds=seeds, per_prompt=3, batch_size=1)
        fixed = sample(role, prompts, sampling, seeds=seeds, per_prompt=3, batch_size=4, graph=True, dense=False)
        turned = sample(role, prompts[::-1], sampling, seeds=seeds[::-1], per_prompt=3, batch_size=4)[::-1]
        single = [
            sample(role, [prompt], sampling, seeds=[seed])[0]
            for i, prompt in enumerate(prompts)
            for seed in seeds[3 * i : 3 * i + 3]
        ]
    for other in (split, fixed, turned, single):
        assert [t.ids for t in together] == [t.ids for t in other]
        logps = [torch.tensor([x for t in found for x in t.logp]) for found in (together, other)]
        assert (logps[0] - logps[1]).abs().max() < 1e-4
    assert (
        [t.prompt for t in together] == [t.prompt for t in split] == [i for i in range(len(prompts)) for _ in range(3)]
    )
    assert len({tuple(t.ids) for t in together[:3]}) == 3  # seeds tell answers to one prompt apart


def chi_square(counts: Counter, prob_V: torch.Tensor, drawn: int) -> tuple[float, int]:
    """(statistic, degrees of freedom); tokens expected fewer than five times count as one."""
    common = [i for i, p in enumerate(prob_V.tolist()) if p * drawn >= 5]
    cells = [(counts[i], prob_V[i].item() * drawn) for i in common]
    rest = drawn - sum(expected for _, expected in cells)
    if rest > 1:
        cells.append((drawn - sum(found for found, _ in cells), rest))
    return sum((found - expected) ** 2 / expected for found, expected in cells), len(cells) - 1


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 8), (1.5, 0.8, 20)]
)
def test_tokens_follow_the_exact_distribution(policy, temperature, top_p, top_k):
    """Chi-square of 6,000 first tokens against the softmax in float64. The bound lies 5 standard deviations above the
    mean."""
    base, drawn = policy.base, 6000
    prompt = prompts_of(base)[0]
    with policy.use("policy") as role:
        sampling = Sampling(1, temperature, top_p, top_k)
        found = sample(role, [prompt], sampling, seeds=range(drawn), per_prompt=drawn, batch_size=2000)
        with torch.no_grad():
            hidden_D = role.hidden(collate(base, [prompt]))[0, -1].double()
    logits_V = base.head_weight_VD.double() @ hidden_D + base.ban_bias_V.double()
    prob_V = torch.softmax(logits_V / temperature, -1)
    if top_k:
        likely = prob_V.topk(top_k)
        prob_V = torch.zeros_like(prob_V).index_copy(0, likely.indices, likely.values / likely.values.sum())
    if top_p < 1:
        order = prob_V.argsort(descending=True)
        kept = order[: int((prob_V[order].cumsum(0) < top_p).sum()) + 1]
        prob_V = torch.zeros_like(prob_V).index_copy(0, kept, prob_V[kept] / prob_V[kept].sum())
    counts = Counter(t.ids[0] for t in found)
    statistic, freedom = chi_square(counts, prob_V, drawn)
    assert freedom >= 5 and statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert all(prob_V[token] > 0 for token in counts)


def one_hot_draw(prob: list[float], uniform: list[float], sampling: Sampling) -> list[int]:
    """`draw` on logits log(prob): the head is the identity."""
    logits_ND = torch.tensor(prob).log().expand(len(uniform), -1)
    eye_VD = torch.eye(len(prob))
    return draw(eye_VD, torch.zeros(len(prob)), logits_ND, torch.tensor(uniform, dtype=torch.float64), sampling)[
        0
    ].tolist()


def test_draw_by_hand():
    """Probabilities .1 .2 .7: the uniform number falls into [0, .1), [.1, .3) or [.3, 1)."""
    uniform = [0.0, 0.05, 0.099, 0.101, 0.299, 0.301, 0.999999]
    assert one_hot_draw([0.1, 0.2, 0.7], uniform, Sampling(1)) == [0, 0, 0, 1, 1, 2, 2]
    # temperature 1/2 squares them: .01 .04 .49, of .54
    assert one_hot_draw([0.1, 0.2, 0.7], [0.018, 0.019, 0.092, 0.093], Sampling(1, temperature=0.5)) == [0, 1, 1, 2]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.5], Sampling(1, temperature=0.0)) == [2, 2]
    # the smallest set that reaches .85 is {.7, .2}; drawn among them by 2 : 7 in the order of ids
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.22, 0.23], Sampling(1, top_p=0.85)) == [1, 1, 2]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.99], Sampling(1, top_p=0.01)) == [2, 2]  # the most likely always stays
    assert one_hot_draw([0.25, 0.25, 0.25, 0.25], [0.0, 0.51], Sampling(1, top_p=0.3)) == [
        0,
        1,
    ]  # of equals, the first ones
    # the two most likely are {.7, .2}; of them, .77 of the probability is in {.7} alone
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.22, 0.23], Sampling(1, top_k=2)) == [1, 1, 2]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.22], Sampling(1, top_p=0.75, top_k=2)) == [2, 2]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.22], Sampling(1, top_p=0.75)) == [1, 1]
    assert one_hot_draw([0.25, 0.25, 0.25, 0.25], [0.0, 0.99], Sampling(1, top_k=1)) == [0, 0]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.05, 0.5], Sampling(1, top_k=9)) == [0, 2]  # more than there are


def test_logp_is_of_the_sampling_distribution():
    logits_ND = torch.tensor([[0.1, 0.2, 0.7]]).log()
    uniform_N = torch.tensor([0.5], dtype=torch.float64)
    for sampling, want in (
        (Sampling(1), 0.7),
        (Sampling(1, 0.5), 0.49 / 0.54),
        (Sampling(1, 1.0, 0.5), 0.7),
        (Sampling(1, 0.0), 0.7),
    ):
        _, logp_N = draw(torch.eye(3), torch.zeros(3), logits_ND, uniform_N, sampling)
        assert logp_N.item() == pytest.approx(math.log(want), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_banned_tokens_are_never_drawn(base, temperature):
    """Even where they are by far the most likely."""
    banned = base.ban_bias_V.nonzero()[:, 0]
    hidden_ND = base.head_weight_VD[banned].repeat_interleave(400, 0) * 20
    generator = torch.Generator().manual_seed(0)
    uniform_N = torch.rand(len(hidden_ND), generator=generator, dtype=torch.float64)
    uniform_N[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token_N, logp_N = draw(base.head_weight_VD, base.ban_bias_V, hidden_ND, uniform_N, Sampling(1, temperature))
    assert not set(token_N.tolist()) & set(banned.tolist())
    assert logp_N.isfinite().all() and (logp_N > -1e20).all()


def test_stop_flags(policy):
    base = policy.base
    prompts = prompts_of(base)
    with policy.use("policy") as role:
        found = sample(role, prompts, Sampling(6), seeds=range(40 * len(prompts)), per_prompt=40, batch_size=64)
    for trajectory in found:
        assert trajectory.stopped == (trajectory.ids[-1] == base.eos_id)
        assert base.eos_id not in trajectory.ids[:-1] and len(trajectory.ids) == len(trajectory.logp)
        assert len(trajectory.ids) == 6 or trajectory.stopped
    assert 0 < sum(t.stopped for t in found) < len(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logp_is_the_rescored_one(policy, temperature):
    """A cached decode against one forward over prompt and answer; and each token is drawn by its own number of its
    answer's stream."""
    base = policy.base
    prompts = prompts_of(base)
    with policy.use("policy") as role:
        found = sample(role, prompts, Sampling(10, temperature), seeds=range(4 * len(prompts)), per_prompt=4)
        rows = lay_out(base, [Group(prompts[t.prompt], [t.ids]) for t in found])
        with torch.no_grad():
            hidden_ND = role.hidden(rows.batch).flatten(0, 1)[rows.before_N]
        logp_N = linear_logprob(
            hidden_ND, base.head_weight_VD, rows.token_N, bias_V=base.ban_bias_V, temperature=temperature
        ).logp_N
    uniform_N = torch.cat([uniforms([seed], 10)[0, : len(t.ids)] for seed, t in enumerate(found)])
    again_N, _ = draw(base.head_weight_VD, base.ban_bias_V, hidden_ND, uniform_N, Sampling(10, temperature))
    assert again_N.tolist() == [token for t in found for token in t.ids]
    sampled_N = torch.tensor([value for t in found for value in t.logp])
    assert (sampled_N - logp_N).abs().max() <= 1e-4


def test_seeds_must_fit(policy):
    prompts = prompts_of(policy.base)
    with policy.use("policy") as role:
        with pytest.raises(ValueError, match="3 seeds for 5 prompts x 2 answers"):
            sample(role, prompts, Sampling(2), seeds=[1, 2, 3], per_prompt=2)
        assert sample(role, [], Sampling(2), seeds=[]) == []


def spy(monkeypatch, owner, name: str) -> list:
    """Records the positional arguments of every call of owner.name, which still does its work."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.append(args), real(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize("slots", [2, 5, 64])
def test_a_free_slot_is_refilled_at_once(policy, monkeypatch, slots):
    """No step runs over an empty row, and as many run side by side as there are slots, until the queue is empty."""
    prompts = prompts_of(policy.base)
    steps, prefills = spy(monkeypatch, DecodeStep, "run"), spy(monkeypatch, rollout.loop, "decode")
    with policy.use("policy") as role:
        found = sample(role, prompts, Sampling(24), seeds=range(4 * len(prompts)), per_prompt=4, batch_size=slots)
    rows = [rows for _, rows, _ in steps]
    assert sum(rows) == sum(len(t.ids) - 1 for t in found)  # the first token comes from the prompt
    assert rows == sorted(rows, reverse=True) and max(rows) == min(slots, 20)
    assert len({len(t.ids) for t in found}) > 3
    assert sum(len(batch.ids_BS) for _, batch, _ in prefills) == len(prompts)  # each prompt once, for its four answers


def test_a_captured_step_runs_over_all_slots(policy, monkeypatch):
    """Static shapes and buffers."""
    prompts = prompts_of(policy.base)
    seen, real = [], policy.base.decoder.forward

    def forward(*args, **kwargs):
        if (cache := kwargs[policy.base.cache_argument]) is not None and isinstance(cache, SlotCache):
            seen.append(
                (tuple(kwargs["inputs_embeds"].shape), tuple(kwargs["attention_mask"].shape), cache.keys.data_ptr())
            )
        return real(*args, **kwargs)

    monkeypatch.setattr(policy.base.decoder, "forward", forward)
    with policy.use("policy") as role:
        sample(role, prompts, Sampling(40), seeds=range(4 * len(prompts)), per_prompt=4, batch_size=3, graph=True)
    width = policy.base.width
    longest = slot_length(max(len(p.ids_S) for p in prompts), 40)
    assert set(seen) == {((3, 1, width), (3, 1, 1, longest), seen[0][2])}  # below 128 the limit is the slot's length
    assert len(seen) > 40


def test_a_row_without_an_answer_stays_within_its_slot(base):
    """A captured step runs over it for as long as any other answer takes."""
    cache = SlotCache(base.decoder.config, 2, 16, torch.float32, base.device)
    step = DecodeStep(base, cache, Sampling(4), channels=1, fixed=True)
    with torch.no_grad():
        found = [step.run(rows=1, longest=15) for _ in range(20)]
    assert cache.length_R.tolist() == [15, 15] and step.count_R.tolist() == [3, 3]
    assert all(len(pairs) == 1 and math.isfinite(pairs[0][1]) for pairs in found)


def test_a_decode_that_does_not_fit_on_a_cpu_is_done_with_fewer_slots(policy, monkeypatch):
    """What torch's CPU allocator says is no OutOfMemoryError; it comes in the middle of the answers."""
    prompts = prompts_of(policy.base)
    seeds, steps = list(range(2 * len(prompts))), []
    real = DecodeStep._advance

    def scarce(self, rows):
        if rows > 3 and len(steps) >= 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        steps.append(rows)
        real(self, rows)

    with policy.use("policy") as role:
        want = sample(role, prompts, Sampling(6), seeds=seeds, per_prompt=2)
        monkeypatch.setattr(DecodeStep, "_advance", scarce)
        got = sample(role, prompts, Sampling(6), seeds=seeds, per_prompt=2)
    assert [t.ids for t in got] == [t.ids for t in want]
    assert max(steps) > 3 and max(steps[2:]) <= 3


def test_a_step_that_cannot_be_captured_is_launched_instead(policy, monkeypatch, caplog):
    """The first capture finds no memory, which halves the slots; the second fails, and answers are as without. Both
    times the allocator is led out of the graph's pool, also where torch has done so already."""
    prompts, cuda = prompts_of(policy.base), torch.cuda
    seeds, streams, pools = list(range(2 * len(prompts))), [], []
    sampling = Sampling(24)
    faults = [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), RuntimeError("not permitted when capturing")]

    def capture(graph, pool):
        raise faults.pop(0)

    def end_pool(device, pool):
        pools.append((device, pool))
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    real = DecodeStep.__init__

    def on_gpu(self, *arguments, **more):
        real(self, *arguments, **more)
        self._pool = (0, 1)

    with policy.use("policy") as role:
        want = sample(role, prompts, sampling, seeds=seeds, per_prompt=2, graph=True)
        monkeypatch.setattr(DecodeStep, "__init__", on_gpu)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
        for name, value in (
            ("current_device", lambda: 0),
            ("current_stream", lambda: "mine"),
            ("set_stream", streams.append),
            ("CUDAGraph", object),
            ("graph", capture),
        ):
            monkeypatch.setattr(cuda, name, value)
        got = sample(role, prompts, sampling, seeds=seeds, per_prompt=2, graph=True)
    assert [t.ids for t in got] == [t.ids for t in want] and not faults
    assert streams == ["mine", "mine"] and pools == [(0, (0, 1))] * 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "going on with 5" in said[0] and said[1].endswith("not permitted when capturing")


def test_slots_that_do_not_fit_are_halved(policy, monkeypatch, caplog):
    prompts = prompts_of(policy.base)
    sampling, seeds = Sampling(6), list(range(2 * len(prompts)))
    real = SlotCache.__init__

    def full(limit):
        def init(self, text_config, slots, *rest):
            if slots > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...")
            real(self, text_config, slots, *rest)

        return init

    with policy.use("policy") as role:
        want = sample(role, prompts, sampling, seeds=seeds, per_prompt=2)
        monkeypatch.setattr(SlotCache, "__init__", full(3))
        got = sample(role, prompts, sampling, seeds=seeds, per_prompt=2)
        assert [t.ids for t in got] == [t.ids for t in want]
        assert [r.getMessage() for r in caplog.records] == [
            "10 answers in flight do not fit (CUDA out of memory): going on with 5.",
            "5 answers in flight do not fit (CUDA out of memory): going on with 2.",
        ]
        monkeypatch.setattr(SlotCache, "__init__", full(0))
        with pytest.raises(torch.OutOfMemoryError):
            sample(role, prompts, sampling, seeds=seeds, per_prompt=2)


def test_bytes_of_a_slot(base):
    """LLaVA-1.5-7B by hand: 512 KiB per token in bfloat16; and what is really allocated."""
    llama = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32)
    assert slot_length(626 + 128, 256) == 1024 and slot_length(1, 1) == 16 and slot_length(16, 2) == 32
    assert slot_bytes(llama, 1024, torch.bfloat16) == 1024 * 512 * 1024
    grouped = Qwen2Config(num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4)
    assert slot_bytes(grouped, 1, torch.bfloat16) == 56 * 1024
    config = base.decoder.config
    cache = SlotCache(config, 3, 32, torch.float32, torch.device("cpu"))
    held = sum(part.numel() * part.element_size() for part in (cache.keys, cache.values))
    assert held == 3 * slot_bytes(config, 32, torch.float32)


@pytest.mark.parametrize("dense, attention, rest", [("auto", 1, 1), (False, 0, 0), (True, 1, 1), ("attention", 1, 0)])
def test_the_recipe_says_what_to_copy(load, dense, attention, rest):
    base = load(dense_rollouts=dense)
    seen, layer = [], base.decoder.layers[0]
    parts = lambda: [*(layer.self_attn.get_submodule(name) for name in ATTENTION), layer.mlp.gate_proj]
    layer.register_forward_hook(lambda *_: seen.append([type(part) is torch.nn.Linear for part in parts()]))
    with Roles(base, Lora()).use(BASE) as role:
        sample(role, prompts_of(base), Sampling(2), seeds=range(5))
    assert seen == [[attention] * 4 + [rest]] * 2 and not any(type(part) is torch.nn.Linear for part in parts())


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
def test_a_captured_step_draws_what_an_eager_one_does(checkpoint, dense, caplog):
    """In float32, with several limits (128 and above) and slots that are refilled: replays follow the buffers."""
    base = load_base(Model(base=str(checkpoint), dtype="float32"), torch.device("cuda"), tower=False)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    prompts = prompts_of(base)
    sampling, seeds = Sampling(200, temperature=1.5), list(range(4 * len(prompts)))
    with roles.use("policy") as role:
        eager, captured = (
            sample(role, prompts, sampling, seeds=seeds, per_prompt=4, batch_size=6, dense=dense, graph=graph)
            for graph in (False, True)
        )
    assert [t.ids for t in captured] == [t.ids for t in eager] and not caplog.records
    assert max(len(t.ids) for t in eager) > 120


@pytest.mark.parametrize("name", ["policy", BASE])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_dense_copy_computes_the_same_and_leaves_no_trace(load, name, quantization):
    roles = Roles(load(quantization), Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    base = roles.base
    batch = collate(base, prompts_of(base))
    before, layers = base.fingerprint(), list(base.model.modules())
    with roles.use(name) as role, torch.no_grad():
        want = role.hidden(batch)[batch.mask_BS]
        with pytest.raises(KeyError), dense_copy(role):
            linears = [m for m in base.decoder.modules() if hasattr(m, "in_features")]
            assert {type(m) for m in linears} == {torch.nn.Linear} and len(linears) == 6 * 7
            got = role.hidden(batch)[batch.mask_BS]
            raise KeyError("whatever happens inside")
        assert (got - want).abs().max() < 1e-4 and (got - want).abs().max() / want.abs().max() < 1e-5
        assert torch.equal(role.hidden(batch)[batch.mask_BS], want)
    assert base.fingerprint() == before
    assert all(a is b for a, b in zip(base.model.modules(), layers, strict=True))
