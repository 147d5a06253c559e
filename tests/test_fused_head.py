"""The fused head inside real (tiny) models: loss and all gradients are those of the model's own logits."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from accel_distill.divergences import TargetKind
from accel_distill.fused_head import FullLogits, FusedHead, Ran
from accel_distill.head_jobs import DenseJob, SparseJob, sparse_chunks
from accel_distill.head_probe import fuse_head
from accel_distill.losses import Objective

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "scaled up": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=1.75)),
    "scaled down": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)),
}
SHAPE = 3, 9  # B, T
POSITIONS = torch.tensor([0, 1, 4, 6, 7, 9, 10, 11, 15, 16, 18, 19, 20, 22, 25])
KINDS: list[TargetKind] = ["threshold", "top_k", "dense"]


def make_model(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # random heads are near zero, and then neither cap nor scale shows
        parameter.data.normal_(std=0.5)
    return model


def make_job(objective: Objective, *, size: int = 4, factor: float = 0.25, with_peak: bool = False) -> Any:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(VOCAB, POSITIONS.shape, generator=generator)
    if objective.kind == "dense":
        teacher = torch.randn(len(POSITIONS), VOCAB - 9, generator=generator)  # a narrower vocabulary
        return DenseJob(objective, POSITIONS, labels, lambda part: teacher[part], factor, with_peak, size)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:3] for _ in POSITIONS])
    offsets = 3 * torch.arange(len(POSITIONS) + 1)
    entries = offsets, ids.flatten(), torch.tensor([0.5, 0.25, 0.125]).repeat(len(POSITIONS))
    return SparseJob(objective, POSITIONS, sparse_chunks(labels, entries, size=size), factor, with_peak)


def inputs() -> dict[str, Any]:
    ids = torch.randint(1, VOCAB, SHAPE, generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def fused(model: PreTrainedModel) -> FusedHead:
    head, reason = fuse_head(model)
    assert head is not None, reason
    return head


def plain(model: nn.Module, job: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return loss and gradients through the model's own logits, all at once."""
    model.zero_grad()
    rows = model(**inputs()).logits.flatten(0, 1)[POSITIONS]
    losses = [job.plain(rows[part], index) for index, part in enumerate(job.parts)]
    loss = sum(job.objective.weigh(found) for found in losses) * job.factor
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def run(head: FusedHead | FullLogits, model: nn.Module, job: Any) -> tuple[Ran, dict[str, Tensor | None]]:
    model.zero_grad()
    ran = head.run(model, job, **inputs())
    ran.loss.backward()
    return ran, gradients(model)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_models_logits_in_float64(
    name: str, kind: TargetKind, temperature: float
) -> None:
    model = make_model(name)
    job = make_job(Objective(0.6, 0.4, temperature, kind))
    exact_loss, exact = plain(copy.deepcopy(model).double(), job)
    plain_loss, yardstick = plain(model, job)
    head = fused(model)
    for found_loss, found in [(ran.loss, grads) for ran, grads in [run(head, model, job)]] + [
        (ran.loss, grads) for ran, grads in [run(FullLogits(), model, job)]
    ]:
        assert abs(found_loss - exact_loss) <= abs(plain_loss - exact_loss) + 2e-6 * abs(exact_loss)
        for key, want in exact.items():
            largest = want.abs().max()
            assert largest > 0
            assert (found[key] - want).abs().max() <= (yardstick[key] - want).abs().max() + 2e-6 * largest, key


@pytest.mark.parametrize("name", MODELS)
def test_the_model_gives_its_own_logits_before_and_after_and_where_it_fails(name: str) -> None:
    model = make_model(name)
    before = model(**inputs()).logits
    head, job = fused(model), make_job(Objective())
    assert torch.equal(model(**inputs()).logits, before)
    run(head, model, job)
    assert torch.equal(model(**inputs()).logits, before)
    with pytest.raises(IndexError):
        head.run(model, SparseJob(job.objective, POSITIONS + 99, job.chunks), **inputs())
    assert torch.equal(model(**inputs()).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_same_losses_come_out_and_the_peak_beside_them(kind: TargetKind) -> None:
    model = make_model("soft-capped")
    head, job = fused(model), make_job(Objective(0.6, 0.4, kind=kind), with_peak=True)
    ran, _ = run(head, model, job)
    with torch.no_grad():
        silent = head.run(model, job, **inputs())
        full = FullLogits().run(model, job, **inputs())
    assert not silent.loss.requires_grad
    for found in (silent, full):
        torch.testing.assert_close(found.loss, ran.loss.detach())
        for got, want in zip([*found.losses, *found.peak], [*ran.losses, *ran.peak], strict=True):
            assert got.shape == (len(POSITIONS),)
            torch.testing.assert_close(got, want)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation's result had in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return result


@pytest.mark.parametrize("name", ["llama", "soft-capped", "scaled up"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_as_large_as_positions_times_vocabulary(name: str, kind: TargetKind) -> None:
    model = make_model(name)
    head = fused(model)
    for temperature in (1.0, 2.0):
        job = make_job(Objective(0.6, 0.4, temperature, kind), size=2, with_peak=True)
        with Largest() as largest:
            run(head, model, job)
            with torch.no_grad():
                head.run(model, job, **inputs())
        assert largest.elements == VOCAB * 16 > 2 * VOCAB * 3  # the head's weight; not 15 x 97 = 1,455
        with Largest() as largest:
            run(FullLogits(), model, job)
        assert largest.elements == SHAPE[0] * SHAPE[1] * VOCAB


def test_a_frozen_head_has_no_gradient_made_and_the_rest_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    head, job = fused(model), make_job(Objective(0.6, 0.4))
    _, want = run(head, model, job)
    model.lm_head.requires_grad_(False)
    made: list[Any] = []
    monkeypatch.setattr("accel_distill.fused_head._add_product", lambda *_: made.append(1))
    _, found = run(head, model, job)
    assert not made and found.pop("lm_head.weight") is None and want.pop("lm_head.weight") is not None
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)


def test_only_the_head_trained_has_its_gradient() -> None:
    model = make_model()
    head, job = fused(model), make_job(Objective(0.6, 0.4))
    _, want = run(head, model, job)
    model.requires_grad_(False).lm_head.requires_grad_(True)
    _, found = run(head, model, job)
    torch.testing.assert_close(found["lm_head.weight"], want["lm_head.weight"])
    assert sum(gradient is not None for gradient in found.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bias", "soft-capped", "scaled down"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
def test_bfloat16_is_as_good_as_the_plain_loss_in_bfloat16(
    name: str, kind: TargetKind, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel_distill.fused_head.WEIGHT_ROWS", 40)  # some rows at a time, the last ones fewer
    model = make_model(name)
    model = model if autocast else model.bfloat16()
    job = make_job(Objective(0.6, 0.4, kind=kind))
    exact_loss, exact = plain(copy.deepcopy(model).double(), job)
    head = fused(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_loss, yardstick = plain(model, job)
        ran, found = run(head, model, job)
    assert ran.loss.dtype == torch.float32
    assert abs(ran.loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 0.01 * abs(exact_loss)
    for key, want in exact.items():
        assert found[key].dtype == dict(model.named_parameters())[key].dtype
        error, usual = (found[key] - want).norm(), (yardstick[key] - want).norm()
        assert error <= 1.3 * usual + 0.01 * want.norm(), key


def test_a_gradient_scaler_for_float16_gives_the_gradients_of_float32() -> None:
    model = make_model()
    head, job = fused(model), make_job(Objective(0.6, 0.4), factor=1e-4)
    _, want = run(head, model, job)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", torch.float16):
        ran = head.run(model, job, **inputs())
    scaler.scale(ran.loss).backward()
    assert model.lm_head.weight.grad.abs().max() > 100 * want["lm_head.weight"].abs().max()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name]).norm() <= 0.01 * want[name].norm(), name


def test_accumulated_losses_add_their_gradients() -> None:
    model = make_model("tied")
    head, job = fused(model), make_job(Objective(0.6, 0.4))
    _, once = run(head, model, job)
    (head.run(model, job, **inputs()).loss * 0.5).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 1.5 * once[name])


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make_model().train()
    head, job = fused(model), make_job(Objective(0.6, 0.4))
    _, want = run(head, model, job)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        _, found = run(head, model, job)
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient)


def test_no_positions_give_a_gradient_of_zero_to_every_parameter() -> None:
    model = make_model("tied")
    none = torch.zeros(0, dtype=torch.int64)
    entries = torch.zeros(1, dtype=torch.int64), none, torch.zeros(0)
    job = SparseJob(Objective(), none, sparse_chunks(none, entries, size=4))
    for head in (fused(model), FullLogits()):
        ran, found = run(head, model, job)
        assert ran.loss == 0.0 and [len(loss) for loss in ran.losses] == [0, 0, 0]
        assert all(gradient is not None and not gradient.any() for gradient in found.values())


def test_a_second_way_back_and_a_second_derivative_are_refused() -> None:
    model = make_model()
    head, job = fused(model), make_job(Objective())
    loss = head.run(model, job, **inputs()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was taken backward before"):
        loss.backward()
    loss = head.run(model, job, **inputs()).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, model.model.norm.weight, create_graph=True)


def test_a_copy_of_a_model_has_a_head_of_its_own_and_a_second_trainer_takes_over() -> None:
    model = make_model()
    first = fused(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not copied(**inputs()).logits.any() and model(**inputs()).logits.any()
    head, job = fused(model), make_job(Objective())
    assert head is not first and head._plain.__func__ is nn.Linear.forward
    assert run(head, model, job)[0].loss > 0


class WithLowRank(nn.Linear):
    """A head as adapters make it: the weight is not all of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(VOCAB, 2))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden @ self.down.t() @ self.up.t()


class Shifted(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(0.5, 2.0, output.logits.shape[-1])
        return output


class Masking(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 90:] = output.logits[..., VOCAB - 1, None]
        return output


class OnlyTheLast(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, logits_to_keep=1)


def refused_models() -> dict[str, tuple[PreTrainedModel, str]]:
    adapted, replaced = make_model(), make_model()
    adapted.set_output_embeddings(WithLowRank(adapted.lm_head))
    replaced.lm_head.forward = replaced.lm_head.forward
    made = {name: of(LlamaConfig(**SIZES)) for name, of in [("s", Shifted), ("m", Masking), ("o", OnlyTheLast)]}
    return {
        "an adapter on the head": (adapted, "WithLowRank, not a plain nn.Linear"),
        "another library's forward": (replaced, "replaced by another library"),
        "more done to the logits": (made["s"], "is off by"),
        "logits by their place": (made["m"], "it fails without its logits: IndexError"),
        "some of the logits": (made["o"], r"its logits for 8 positions are \(1, 1, 97\)"),
    }


@pytest.mark.parametrize("name", refused_models())
def test_a_head_that_cannot_be_fused_is_left_alone_and_the_reason_is_given(name: str) -> None:
    model, sentence = refused_models()[name]
    before = model(**inputs()).logits
    head, reason = fuse_head(model)
    assert head is None
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(reason)
    assert torch.equal(model(**inputs()).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_processes_go_by_what_they_agree_on() -> None:
    refused, fine = refused_models()["more done to the logits"][0], make_model()
    found: list[str] = []
    head, reason = fuse_head(refused, lambda reason: found.append(reason) or "")
    assert head is not None and reason == "" and "is off by" in found[0]
    assert fuse_head(fine, lambda reason: reason + "another process's reason") == (None, "another process's reason")
    assert "forward" not in fine.lm_head.__dict__


def test_a_model_without_its_weights_yet_has_a_reason_and_not_an_error() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    head, reason = fuse_head(model)
    assert head is None and "meta" in reason


def test_an_adapter_on_the_head_is_trained_through_full_logits() -> None:
    model, _ = refused_models()["an adapter on the head"]
    job = make_job(Objective(0.6, 0.4))
    want_loss, want = plain(model, job)
    ran, found = run(FullLogits(), model, job)
    torch.testing.assert_close(ran.loss.detach(), want_loss)
    assert found["lm_head.up"].abs().max() > 0
    for key, gradient in want.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("unit", ["root", "head"])
def test_fsdp2_that_rounds_the_models_output_to_bfloat16_rounds_neither_the_loss_nor_its_scale(
    unit: str, alone: None
) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model("soft-capped" if unit == "root" else "llama")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # a unit of its own cannot be tied
    job = make_job(Objective(0.6, 0.4), factor=1 / 3)  # no bfloat16
    _, exact = plain(copy.deepcopy(model).double(), job)
    head = fused(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    if unit == "head":
        fully_shard(model.lm_head, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    assert model(**inputs()).logits.dtype == torch.bfloat16
    ran = head.run(model, job, **inputs())
    ran.loss.backward()
    assert ran.loss.dtype == torch.float32
    assert float(ran.loss) == pytest.approx(float(job.objective.weigh(ran.losses)) / 3, rel=1e-6)
    for name, parameter in model.named_parameters():
        found, want = parameter.grad.full_tensor(), exact[name]
        scale = float((found * want).sum() / (want * want).sum())
        assert scale == pytest.approx(1, abs=0.02), name
        assert (found - want).norm() < 0.1 * want.norm(), name
