"""The divergences by name, which targets allow which of them, and the sentence that refuses the rest; no torch.

The one decision: a divergence that a kind of target gives only with a bias that nobody chose is refused, not
approximated. Sampled targets are right on average, and only the forward KL is linear in them. What it costs: reverse
KL and its kin need a cache of `top_k` targets.
"""

from typing import Literal, get_args

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "alpha_beta"]
TargetKind = Literal["threshold", "random", "top_k", "dense"]  # dense: all of a teacher's logits, never cached
TopKTail = Literal["bucket", "renormalize"]

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
ALLOWED: dict[TargetKind, tuple[Divergence, ...]] = {
    "threshold": ("forward_kl",),
    "random": ("forward_kl",),
    "top_k": DIVERGENCES,
    "dense": DIVERGENCES,
}


def refused_divergence(kind: TargetKind, divergence: Divergence) -> str | None:
    """Return why `kind` targets do not allow the divergence and what works instead; None where they do."""
    if divergence in ALLOWED[kind]:
        return None
    allowed = " or ".join(ALLOWED[kind])
    return (
        f"{divergence} cannot be taken from {kind} targets: they are sampled, and only {allowed} is right on average; "
        f"expected {allowed}, or targets.method=top_k, which allows {', '.join(ALLOWED['top_k'])}"
    )


def refused_tail(kind: TargetKind, tail: TopKTail) -> str | None:
    """Return why `kind` targets have no tail to treat so; None where they have."""
    if tail == "bucket" or kind == "top_k":
        return None
    return f"{tail} is for top_k targets, whose other ids are lost, and these are {kind}; expected bucket (the default)"
