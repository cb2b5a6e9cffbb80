"""Roles on one base: isolated gradients, scopes, copies, files that plain PEFT loads.

Shapes: B rows, S positions, D width, V vocabulary.
"""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from core import shake, video_of
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError
from rlaif_lite.model.inputs import Batch, collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora


def batch_of(base) -> Batch:
    rows = [
        encode_prompt(base, [Message("user", "<video> describe the video")], video_of(base)),
        encode_prompt(base, [Message("user", "what is true ?")], None),
    ]
    return collate(base, rows)


def hidden(roles: Roles, name: str) -> torch.Tensor:
    with torch.no_grad(), roles.use(name) as role:
        return role.hidden(batch_of(roles.base))


def bits(roles: Roles, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in roles.parameters(name)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_gradient_reaches_its_own_role_only(roles):
    for name in ("policy", "value", "reference"):
        roles.add(name, seed=len(name))
        shake(roles, name, seed=len(name))
    roles.add_head("value", zero=False)
    roles.trainable("policy")
    roles.trainable("value")
    before = {name: bits(roles, name) for name in roles.names}
    optimizer = torch.optim.SGD(roles.parameters("policy") + roles.parameters("value"), lr=0.1)

    with roles.use("policy") as role:
        role.hidden(batch_of(roles.base)).pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.parameters("policy"))
    assert all(p.grad is None for name in ("value", "reference") for p in roles.parameters(name))
    optimizer.step()
    optimizer.zero_grad()
    after_policy = bits(roles, "policy")
    assert not same(after_policy, before["policy"]) and same(bits(roles, "value"), before["value"])

    with roles.use("value") as role:
        role.scalar(role.hidden(batch_of(roles.base))).pow(2).mean().backward()
    optimizer.step()
    assert same(bits(roles, "policy"), after_policy) and not same(bits(roles, "value"), before["value"])
    assert same(bits(roles, "reference"), before["reference"])
    assert all(p.grad is None for p in roles.base.head_weight_VD[None])


def test_roles_differ_and_the_base_is_without_any(roles, base):
    plain = hidden(Roles(base, Lora(rank=4, alpha=8.0)), "base")
    roles.add("policy")
    assert torch.equal(hidden(roles, "policy"), plain)  # a fresh adapter adds nothing
    shake(roles, "policy")
    assert (hidden(roles, "policy") - plain).abs().max() > 1e-2
    assert torch.equal(hidden(roles, "base"), plain)


def test_a_scope_inside_another_is_refused(roles):
    roles.add("policy")
    roles.add("value")
    with roles.use("policy"):
        refused = pytest.raises(ModelError, match="`value` was opened inside the scope of `policy`")
        with refused, roles.use("value"):
            pass
        with pytest.raises(ModelError, match="removed inside the scope of `policy`"):
            roles.remove("value")
    with pytest.raises(ZeroDivisionError), roles.use("policy"):
        raise ZeroDivisionError
    with roles.use("value") as role:  # an error in a scope closes it
        assert role.name == "value"


def test_unknown_and_doubled_names(roles):
    roles.add("policy")
    with pytest.raises(ModelError, match="no role `polcy`; there are base, policy"), roles.use("polcy"):
        pass
    for name in ("policy", "base"):
        with pytest.raises(ModelError, match=f"Role `{name}` exists already"):
            roles.add(name)


@pytest.mark.parametrize("where", ["outside", "another"])
def test_a_backward_elsewhere_is_refused(roles, where):
    for name in ("policy", "value"):
        roles.add(name)
        shake(roles, name)
        roles.trainable(name)
    with roles.use("policy") as role:
        loss = role.hidden(batch_of(roles.base)).pow(2).mean()
    with pytest.raises(ModelError, match="gradient of role `policy` arrived in the scope of"):
        if where == "outside":
            loss.backward()
        else:
            with roles.use("value"):
                loss.backward()
    assert all(p.grad is None for name in ("policy", "value") for p in roles.parameters(name))


def test_a_copy_is_the_same_and_then_its_own(roles):
    roles.add("sft", seed=1)
    shake(roles, "sft")
    roles.add_head("sft", zero=False, seed=4)
    roles.add("policy", copy_of="sft")
    assert same(bits(roles, "policy"), bits(roles, "sft"))
    assert torch.equal(hidden(roles, "policy"), hidden(roles, "sft"))
    before = bits(roles, "sft")
    shake(roles, "policy", seed=9)
    assert same(bits(roles, "sft"), before) and not same(bits(roles, "policy"), before)


def test_fresh_roles_follow_their_seed_alone(roles):
    torch.manual_seed(0)
    roles.add("one", seed=7)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    roles.add("two", seed=7)
    roles.add("three", seed=8)
    assert same(bits(roles, "one"), bits(roles, "two")) and not same(bits(roles, "one"), bits(roles, "three"))
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # the caller's random numbers are left as they were


def test_adding_a_role_keeps_who_is_trained(roles):
    def trained() -> dict[str, bool]:
        return {name: all(p.requires_grad for p in roles.parameters(name)) for name in roles.names}

    roles.add("policy")
    roles.trainable("policy")
    roles.add("reference", copy_of="policy")
    assert trained() == {"policy": True, "reference": False}
    roles.trainable("policy", False)
    roles.trainable("reference")
    roles.add("value")
    assert trained() == {"policy": False, "reference": True, "value": False}
    for name in roles.names:  # using a role trains nobody
        with roles.use(name):
            assert trained() == {"policy": False, "reference": True, "value": False}


def test_saved_roles_come_back_bit_for_bit(roles, load, tmp_path):
    roles.add("reward", seed=2)
    shake(roles, "reward")
    roles.add_head("reward", zero=False, seed=3)
    shake(roles, "reward", seed=5)  # the head's bias too
    roles.save("reward", tmp_path / "adapters" / "reward")
    roles.save("reward", tmp_path / "adapters" / "reward")  # over an older one
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["reward"]
    assert sorted(p.name for p in (tmp_path / "adapters" / "reward").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "files.sha256",
        "head.safetensors",
    ]

    other = Roles(load(), Lora(rank=2, alpha=1.0))  # the file's shape counts, not the recipe's
    other.load("again", tmp_path / "adapters" / "reward")
    assert same(bits(other, "again"), bits(roles, "reward"))
    assert torch.equal(hidden(other, "again"), hidden(roles, "reward"))
    assert not any(p.requires_grad for p in other.parameters("again"))


def test_plain_peft_loads_a_saved_role(load, checkpoint, tmp_path):
    base = load(quantization="none")
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("sft", seed=1)  # not the first or only one on the base when it is saved
    roles.add("policy", seed=2)
    shake(roles, "policy")
    roles.save("policy", tmp_path / "policy")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(checkpoint), tmp_path / "policy")
    batch = collate(base, [encode_prompt(base, [Message("user", "what is the colour first ?")], None)])
    with torch.no_grad(), roles.use("policy") as role:
        want_BSV = role.hidden(batch) @ base.head_weight_VD.T
    with torch.no_grad():
        got_BSV = plain(input_ids=batch.ids_BS, attention_mask=batch.mask_BS).logits
        adapted = plain.get_base_model()
        with plain.disable_adapter():
            bare_BSV = adapted(input_ids=batch.ids_BS, attention_mask=batch.mask_BS).logits
    assert (got_BSV - want_BSV).abs().max() <= 1e-5
    assert (got_BSV - bare_BSV).abs().max() > 1e-2  # the adapter does something
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint) and config["inference_mode"] is True


def test_what_cannot_be_loaded_is_said(roles, load, tmp_path):
    with pytest.raises(ModelError, match="no adapter at .*adapter_model.safetensors is missing"):
        roles.load("sft", tmp_path / "nothing")
    roles.add("sft")
    roles.save("sft", tmp_path / "sft")
    (tmp_path / "sft" / "files.sha256").unlink()  # as an adapter from elsewhere
    tensors = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(4, 5)}, tmp_path / "sft" / "adapter_model.safetensors")
    other = Roles(load(), Lora(rank=4, alpha=8.0))
    with pytest.raises(ModelError, match="has shape .4, 5., this base needs"):
        other.load("sft", tmp_path / "sft")
    tensors.pop(name)
    save_file(tensors, tmp_path / "sft" / "adapter_model.safetensors")
    other = Roles(load(), Lora(rank=4, alpha=8.0))
    with pytest.raises(ModelError, match="has no tensor `.*another architecture"):
        other.load("sft", tmp_path / "sft")


def test_removed_roles_leave_nothing_and_may_come_again(roles):
    plain = hidden(roles, "base")
    roles.add("one", seed=1)
    shake(roles, "one")
    roles.add_head("one", zero=True)
    roles.add("two", seed=2)
    shake(roles, "two")
    with_two = hidden(roles, "two")
    roles.remove("one")
    assert roles.names == ["two"] and not roles.heads
    assert torch.equal(hidden(roles, "two"), with_two)
    roles.remove("two")
    assert roles.names == [] and torch.equal(hidden(roles, "base"), plain)
    assert not any("lora_" in name for name, _ in roles.base.model.named_parameters())
    roles.add("one", seed=1)
    assert torch.equal(hidden(roles, "one"), plain)
    roles.add("two", seed=2)
    shake(roles, "two")
    assert torch.equal(hidden(roles, "two"), with_two)


def test_heads(roles):
    roles.add("value")
    roles.add_head("value", zero=True)
    with torch.no_grad(), roles.use("value") as role:
        hidden_BSD = role.hidden(batch_of(roles.base))
        assert (role.scalar(hidden_BSD) == 0).all()
    roles.add_head("value", zero=False, seed=1)
    head = roles.heads["value"]
    with torch.no_grad(), roles.use("value") as role:
        value_BS = role.scalar(hidden_BSD.bfloat16())  # in float32, whatever the base computes in
        by_hand = (hidden_BSD[1, 3].bfloat16().float() * head.weight[0]).sum() + head.bias[0]
    assert value_BS.shape == hidden_BSD.shape[:2] and value_BS.dtype == torch.float32
    assert torch.allclose(value_BS[1, 3], by_hand, atol=1e-5)
    first = head.weight.clone()
    roles.add_head("value", zero=False, seed=1)
    assert torch.equal(roles.heads["value"].weight, first) and (roles.heads["value"].bias == 0).all()


def test_sizes(roles):
    """Rank 4 on 128 -> 128 (q, k, v, o), 128 -> 256 (gate, up), 256 -> 128 (down), 6 layers; the head has 129."""
    roles.add("policy")
    adapter = 6 * 4 * (4 * (128 + 128) + 3 * (128 + 256))
    assert roles.size("policy") == (adapter, 4 * adapter)
    roles.add_head("policy", zero=True)
    assert roles.size("policy") == (adapter + 129, 4 * (adapter + 129))


def test_targets_that_match_nothing_are_refused(load):
    with pytest.raises(ModelError, match="no linear layer `q_prj`. Did you mean `q_proj`. It has down_proj, gate_proj"):
        Roles(load(), Lora(targets=("v_proj", "q_prj"))).add("policy")


def test_the_tower_gets_no_adapter(load):
    """CLIP has q_proj and v_proj too."""
    base = load(tower=True)
    Roles(base, Lora(rank=4, alpha=8.0)).add("policy")
    adapted = [name for name, _ in base.model.named_parameters() if "lora_" in name]
    assert adapted and all(".language_model." in name for name in adapted)
