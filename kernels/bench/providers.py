"""Who can compute what: every way to get from hidden states to log-probs or losses that the bench compares, ours and
peers'.

A provider is a function of a Problem and a task that returns a step to be timed, or raises CannotRun with the reason. A
step runs the whole task, leaves the gradient in `problem.hidden_ND.grad` where the task has one, and returns per-token
log-probs or None.

Tasks, and the matmuls each cannot do without when the head is frozen:
    score   log-prob and entropy per token, no gradient              1
    train   log-prob per token, backward with a GIVEN gradient       2
    sft     mean cross-entropy, backward                             2
    grpo    clipped policy loss with k3 penalty, backward            2
    kl      exact KL to a reference in the loss, backward            3

Shapes: N tokens, D channels, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlaif_kernels import linear_logprob
from rlaif_lite.rl.losses import clipped_loss, sft_loss
from rlaif_lite.rl.shaping import kl_penalty

MATMULS = {"score": 1, "train": 2, "sft": 2, "grpo": 2, "kl": 3}
CLIP, KL_COEF, ROWS_PER_ANSWER = 0.2, 0.1, 8
LIGER_ANSWERS = 64  # that it takes at a time; its default of one would make 1,024 launches of 8 rows
Step = Callable[[], Tensor | None]


class CannotRun(Exception):
    """Why a provider has no number for a task."""


class Problem(NamedTuple):
    """One shape's inputs."""

    hidden_ND: Tensor  # requires grad
    weight_VD: Tensor  # frozen
    target_N: Tensor
    upstream_N: Tensor  # the given gradient of `train`
    reference_ND: Tensor
    old_logp_N: Tensor
    reference_logp_N: Tensor
    advantage_N: Tensor  # constant within an answer, as GRPO wants it


def make_problem(N: int, D: int, V: int, dtype: torch.dtype, device: str) -> Problem:
    """Hidden states as a trained model has them: some tokens certain, some not.

    Zeros would run faster, and flat noise would starve a gradient filter. Each row points at its target by a different
    amount, so that p(target) runs from 1/V to nearly 1.
    """
    generator = torch.Generator(device).manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    N = N // ROWS_PER_ANSWER * ROWS_PER_ANSWER
    weight_VD = randn(V, D) / math.sqrt(D)
    target_N = torch.randint(0, V, (N,), generator=generator, device=device)
    aim_N1 = torch.rand(N, 1, generator=generator, device=device) * 2 * math.log(V)
    hidden_ND = 1.5 * randn(N, D) + aim_N1 * weight_VD[target_N]
    reference_ND = hidden_ND + 0.05 * randn(N, D)
    hidden_ND, reference_ND, weight_VD = hidden_ND.to(dtype), reference_ND.to(dtype), weight_VD.to(dtype)
    logp_N, ref_N = (linear_logprob(rows, weight_VD, target_N).logp_N for rows in (hidden_ND, reference_ND))
    return Problem(
        hidden_ND.requires_grad_(),
        weight_VD,
        target_N,
        randn(N),
        reference_ND,
        logp_N + 0.1 * randn(N),
        ref_N,
        randn(N // ROWS_PER_ANSWER).repeat_interleave(ROWS_PER_ANSWER),
    )


def matmuls(p: Problem, task: str) -> Step:
    """The matmuls alone, cuBLAS, into buffers that exist already: the floor."""
    N, V = len(p.target_N), len(p.weight_VD)
    logits_NV = torch.zeros(N, V, dtype=p.weight_VD.dtype, device=p.weight_VD.device)
    hidden_ND = p.hidden_ND.detach()
    out_ND = torch.empty_like(hidden_ND)

    def step() -> None:
        torch.mm(hidden_ND, p.weight_VD.T, out=logits_NV)
        if task == "kl":
            torch.mm(p.reference_ND, p.weight_VD.T, out=logits_NV)
        if task != "score":
            torch.mm(logits_NV, p.weight_VD, out=out_ND)

    return step


def ours(p: Problem, task: str) -> Step:
    """rlaif_kernels."""
    return _ours(p, task, "auto")


def ours_torch(p: Problem, task: str) -> Step:
    """rlaif_kernels without Triton."""
    return _ours(p, task, "torch")


def _ours(p: Problem, task: str, impl: str) -> Step:
    head = (p.hidden_ND, p.weight_VD, p.target_N)

    def step() -> Tensor | None:
        if task == "score":
            with torch.no_grad():
                return linear_logprob(*head, impl=impl).logp_N
        if task == "kl":
            found = linear_logprob(*head, reference_hidden_ND=p.reference_ND, differentiable="all", impl=impl)
        else:
            found = linear_logprob(*head, impl=impl)
        if task == "train":
            found.logp_N.backward(p.upstream_N)
            return found.logp_N.detach()
        _loss(p, task, found.logp_N, found.kl_N).backward()
        return None

    return step


def _loss(p: Problem, task: str, logp_N: Tensor, kl_N: Tensor | None) -> Tensor:
    """The loss of `sft`, `grpo` and `kl`, by the project's own functions."""
    if task == "sft":
        return sft_loss(logp_N, torch.ones_like(logp_N), len(logp_N))
    if task == "grpo":
        kl_N = kl_penalty(logp_N, p.reference_logp_N, "k3")
    return (clipped_loss((logp_N - p.old_logp_N).exp(), p.advantage_N, CLIP, CLIP, None) + KL_COEF * kl_N).mean()


def eager(p: Problem, task: str) -> Step:
    """What Hugging Face models do: logits in the model's dtype, softmax in float32, autograd."""
    return _materialised(p, task, lambda function: function)


def compiled(p: Problem, task: str) -> Step:
    """The same under torch.compile."""
    if not p.hidden_ND.is_cuda:
        raise CannotRun("compiling for a CPU says nothing about a GPU")
    return _materialised(p, task, torch.compile)


def _materialised(p: Problem, task: str, transform: Callable) -> Step:
    def log_probs(hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        logp_NV = F.linear(hidden_ND, p.weight_VD).float().log_softmax(-1)
        return logp_NV, logp_NV.gather(1, p.target_N[:, None])[:, 0]

    def forward(hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(what backward starts from, per-token log-probs)"""
        logp_NV, logp_N = log_probs(hidden_ND)
        if task == "score":
            return -(logp_NV.exp() * logp_NV).sum(-1), logp_N
        if task == "train":
            return logp_N, logp_N
        kl_N = None
        if task == "kl":
            with torch.no_grad():
                ref_NV, _ = log_probs(p.reference_ND)
            kl_N = (logp_NV.exp() * (logp_NV - ref_NV)).sum(-1)
        return _loss(p, task, logp_N, kl_N), logp_N

    forward = transform(forward)

    def step() -> Tensor:
        with torch.set_grad_enabled(task != "score"):
            start, logp_N = forward(p.hidden_ND)
        if task != "score":
            start.backward(p.upstream_N if task == "train" else None)
        return logp_N.detach()

    return step


def torch_linear_cross_entropy(p: Problem, task: str) -> Step:
    """torch.nn.functional.linear_cross_entropy, chunked."""
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return _nll(
        p,
        task,
        lambda reduction: F.linear_cross_entropy(
            p.hidden_ND, p.weight_VD, p.target_N, reduction=reduction, options=options
        ),
    )


def cce(p: Problem, task: str) -> Step:
    """Cut Cross-Entropy with its gradient filter, as it comes."""
    return _cce(p, task, {"impl": "cce"})


def cce_exact(p: Problem, task: str) -> Step:
    """Cut Cross-Entropy without the filter."""
    return _cce(p, task, {"impl": "cce_exact"})


def _cce(p: Problem, task: str, options: dict) -> Step:
    function = _import("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    if not p.hidden_ND.is_cuda:
        raise CannotRun("its kernels need a GPU")
    try:
        function(p.hidden_ND[:1], p.weight_VD, p.target_N[:1], **options)
    except NotImplementedError:
        # what the release on PyPI (25.1) says to the name `cce_exact`; it has a filter threshold instead
        options = {"impl": "cce", "filter_eps": None}
    return _nll(
        p, task, lambda reduction: function(p.hidden_ND, p.weight_VD, p.target_N, reduction=reduction, **options)
    )


def liger(p: Problem, task: str) -> Step:
    """Liger: fused linear cross-entropy, GRPO and JSD at beta 1, which is KL(policy || reference)."""
    if task == "grpo":
        loss_class = _import("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearGRPOLoss
        answers = (-1, ROWS_PER_ANSWER)
        loss = loss_class(
            beta=KL_COEF,
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            loss_type="bnpo",
            compiled=p.hidden_ND.is_cuda,
            chunk_size=LIGER_ANSWERS,
        )
        arguments = (
            p.target_N.view(answers),
            torch.ones_like(p.old_logp_N).view(answers),
            p.advantage_N.view(answers)[:, 0],
        )
        logps = {
            "ref_per_token_logps": p.reference_logp_N.view(answers),
            "old_per_token_logps": p.old_logp_N.view(answers),
        }

        def step() -> None:
            hidden_BTD = p.hidden_ND.view(*arguments[0].shape, -1)
            loss(hidden_BTD, p.weight_VD, *arguments, **logps)[0].backward()

        return step
    if not p.hidden_ND.is_cuda:
        raise CannotRun("its kernels need a GPU")
    transformers_side = _import("liger_kernel.transformers", "liger-kernel")
    if task == "kl":
        # the divergence alone, a scalar: the policy loss that ours adds would cost it a second pass
        jsd = transformers_side.LigerFusedLinearJSD(jsd_beta=1.0)
        return lambda: jsd(p.hidden_ND, p.weight_VD, p.reference_ND, p.weight_VD, p.target_N).backward()
    losses = {name: transformers_side.LigerFusedLinearCrossEntropyLoss(reduction=name) for name in ("mean", "none")}
    return _nll(p, task, lambda reduction: losses[reduction](p.weight_VD, p.hidden_ND, p.target_N))


def trl(p: Problem, task: str) -> Step:
    """TRL's chunked log-prob."""
    if task not in ("score", "train"):
        raise CannotRun("it gives log-probs; its losses are built on those, outside")
    function = _import("trl.kernels", "trl").ChunkedLogProbFunction
    outputs = ("entropy",) if task == "score" else ()

    def step() -> Tensor:
        with torch.set_grad_enabled(task == "train"):
            logp_N = function.apply(p.hidden_ND, p.weight_VD, None, p.target_N, 1.0, 8192, None, 1.0, outputs)[0]
        if task == "train":
            logp_N.backward(p.upstream_N)
        return logp_N.detach()

    return step


def _nll(p: Problem, task: str, nll: Callable[[str], Tensor]) -> Step:
    """`train` and `sft` from a cross-entropy with a `reduction`, the only tasks it can do."""
    if task not in ("train", "sft"):
        raise CannotRun("a cross-entropy alone: no entropy, no KL, no ratio")

    def step() -> Tensor | None:
        loss = nll("none" if task == "train" else "mean")
        loss.backward(-p.upstream_N.to(loss.dtype) if task == "train" else None)
        return -loss.detach().float() if task == "train" else None

    return step


def _import(module: str, package: str):
    try:
        return __import__(module, fromlist=["_"])
    except Exception as error:  # a peer that is broken here is listed, whatever it raises
        raise CannotRun(
            f"{package} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


PROVIDERS = {
    "matmuls alone": matmuls,
    "rlaif_kernels": ours,
    "rlaif_kernels (torch path)": ours_torch,
    "Hugging Face eager": eager,
    "torch.compile": compiled,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "Cut Cross-Entropy (cce)": cce,
    "Cut Cross-Entropy (exact)": cce_exact,
    "Liger": liger,
    "TRL chunked": trl,
}
