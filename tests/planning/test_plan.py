"""`plan_edit` against sums done by hand, models that are really built, and the memory that real passes take."""

import copy
import json
import resource

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

from peft_locft import Edit, EditConfig, EditSet, EditTrainer, LocFTConfig, Plan, plan_edit
from peft_locft.edits.tokens import encode_answers
from peft_locft.planning.cards import RESERVED, card_fits


HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 64, 128, 4, 2, 16  # of the tiny Llama in conftest.py
ARCHITECTURES = ["llama", "gemma3", "gpt2", "qwen3", "mixtral"]
PLACE = LocFTConfig(layers=[1])
# 72B parameters in the shape of Qwen2.5-72B.
LARGE = Qwen2Config(
    hidden_size=8192,
    num_hidden_layers=80,
    intermediate_size=29568,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=152064,
    dtype="bfloat16",
)


def size(*modules) -> int:
    """The bytes of the weights of some modules, shared ones counted once."""
    return sum(p.numel() * p.element_size() for p in {p for module in modules for p in module.parameters()})


def phases(plan: Plan) -> dict:
    return {phase.name: phase for phase in plan.phases}


def peak_of(work) -> int:
    """The most bytes that live at a time, of all that is allocated meanwhile, as torch's profiler sees it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ---- Weights ----


@pytest.mark.filterwarnings("ignore:the fused experts")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_a_built_model(architecture, dtype, make):
    model = make(architecture).to(getattr(torch, dtype))
    plan = plan_edit(model.config, PLACE, num_edits=8, dtype=dtype)
    layers = model.transformer.h if architecture == "gpt2" else model.model.layers
    head = 0 if architecture == "gpt2" else size(model.lm_head)  # tied
    assert sum(plan.weights.values()) == size(model)
    assert plan.weights["below"] == size(layers[0])
    assert plan.weights["embeddings"] == size(model.get_input_embeddings())
    assert plan.weights["head"] == head
    assert plan.parameters == model.num_parameters()
    assert plan.dtype == dtype
    peft_model = get_peft_model(model, PLACE)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert plan.trained_parameters == sum(p.numel() for p in trained)
    after = phases(plan)["train"].device
    assert after["adapter"] == sum(p.numel() * p.element_size() for p in trained) == 4 * plan.trained_parameters
    assert after["Adam's moments"] == 2 * after["adapter"]


def test_an_adapter_file_has_the_size_that_was_planned(make, tmp_path):
    model = make("llama")
    get_peft_model(model, PLACE).save_pretrained(tmp_path)
    planned = phases(plan_edit(model.config, PLACE, num_edits=8))["save"].disk["adapter"]
    assert planned == pytest.approx((tmp_path / "adapter_model.safetensors").stat().st_size, abs=200)  # its header


def test_the_dtype_is_the_configs_own_or_float32(make):
    config = make("llama").config
    config.dtype = None
    assert plan_edit(config, num_edits=8).dtype == "float32"
    config.dtype = torch.bfloat16
    plan = plan_edit(config, num_edits=8)
    assert plan.dtype == "bfloat16"
    wide = plan_edit(config, num_edits=8, dtype=torch.float32)
    assert wide.weights["above"] == 2 * plan.weights["above"]
    load = phases(wide)["load"]
    assert load.cpu["weights"] == load.device["weights"] == 2 * load.disk["the model's files"]


# ---- Operations ----


def products(tokens: int) -> int:
    """A layer's matrix products: q and o, k and v, gate, up and down."""
    return 2 * tokens * (2 * HIDDEN * HEADS * WIDTH + 2 * HIDDEN * KV_HEADS * WIDTH + 3 * HIDDEN * INNER)


def attention(edits: int, tokens: int) -> int:
    """Queries by keys, scores by values."""
    return 2 * 2 * edits * HEADS * tokens**2 * WIDTH


def test_operations_of_a_llama_are_those_counted_by_hand(make):
    config = make("llama").config
    edits, tokens, targets, batch = 32, 12, 4, 16
    plan = plan_edit(config, PLACE, num_edits=edits, tokens_per_edit=tokens, target_tokens=targets, batch_size=batch)
    assert plan.cache_flops == products(edits * tokens) + attention(edits, tokens)
    delta = 2 * edits * tokens * HIDDEN * INNER
    head = 2 * edits * targets * HIDDEN * config.vocab_size
    forward = 2 * products(edits * tokens) + 2 * attention(edits, tokens) + delta + head
    # Back through the head and the upper layer to what the delta said, and to the delta. Nothing is below it, frozen
    # weights get no gradient, and attention computes its scores anew beside four products.
    backward = head + products(edits * tokens) + attention(edits, tokens) * 5 // 2 + delta
    assert plan.epoch_flops == forward + backward


def test_without_the_cache_an_epoch_costs_the_lower_layers_too(make):
    config = make("llama").config
    plan = plan_edit(config, PLACE, num_edits=32, batch_size=16)
    whole = plan_edit(config, PLACE, num_edits=32, batch_size=16, prefix_cache=False)
    assert (plan.prefix_cache, whole.prefix_cache) == (True, False)
    assert whole.epoch_flops - plan.epoch_flops == products(32 * 20) + attention(32, 20)
    assert whole.cache_flops == 0 and "build cache" not in phases(whole)
    assert whole.weights["below"] == 0 and sum(whole.weights.values()) == sum(plan.weights.values())


def test_a_mixture_costs_its_chosen_experts_only(make):
    config = make("mixtral").config
    config.num_local_experts = 8
    many = plan_edit(config, PLACE, num_edits=32)
    config.num_local_experts = 4
    few = plan_edit(config, PLACE, num_edits=32)
    # The router has a column for each expert, and that is all: each token still goes through two.
    assert many.cache_flops - few.cache_flops == 2 * 32 * 20 * HIDDEN * (8 - 4)


def test_operations_grow_with_the_number_of_edits(make):
    config = make("llama").config
    one, two = (plan_edit(config, PLACE, num_edits=n, batch_size=40) for n in (4000, 8000))
    assert two.epoch_flops == 2 * one.epoch_flops and two.cache_flops == 2 * one.cache_flops


# ---- Memory ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_takes_what_was_planned(architecture, make):
    batch, tokens, targets = 50, 20, 5
    model = make(architecture)
    sizes = {"num_edits": 200, "batch_size": batch, "tokens_per_edit": tokens, "target_tokens": targets}
    plan = plan_edit(model.config, PLACE, prefix_cache=False, **sizes)
    model = get_peft_model(model, PLACE).eval()
    ids = torch.ones(batch, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    kept = torch.zeros(batch, tokens, dtype=torch.bool)
    kept[:, -targets - 1 : -1] = True

    def loss():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        return F.cross_entropy(logits.reshape(batch * targets, -1).float(), torch.ones(batch * targets).long())

    def step():
        loss().backward()

    step()
    model.zero_grad()
    measured = peak_of(step)
    assert phases(plan)["train"].device["activations and gradient"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_passes_without_gradients_take_what_was_planned(architecture, make):
    model = make(architecture)
    plan = plan_edit(model.config, PLACE, num_edits=200)
    model = get_peft_model(model, PLACE).eval()
    base = model.get_base_model()
    layers = base.transformer.h if architecture == "gpt2" else base.model.layers
    mask = torch.ones(32, 20 + 3, dtype=torch.long)  # 15 tokens of prompt, and the 8 that an answer has at least
    mask[0, 0] = 0

    @torch.no_grad()
    def read():
        return model(torch.ones_like(mask), attention_mask=mask, use_cache=True, logits_to_keep=1)

    planned = phases(plan)["evaluate"].device["activations with keys and values"]
    assert planned == pytest.approx(peak_of(read), rel=0.1)

    for layer in layers[1:]:
        layer.forward = lambda states, *args, **kwargs: states

    @torch.no_grad()
    def lower():
        ids = torch.ones(32, 20, dtype=torch.long)
        model(ids, attention_mask=mask[:, :20], use_cache=False, logits_to_keep=1)

    assert phases(plan)["build cache"].device["activations"] == pytest.approx(peak_of(lower), rel=0.1)


def test_a_real_run_takes_what_was_planned(smollm, tmp_path):
    """What the trainer takes beside the model, and so all that the plan names but the weights."""
    model, tokenizer = smollm
    place = LocFTConfig(layers=[22])
    prompts = [f"The capital of country {number} is" for number in range(32)]
    edits = EditSet(Edit(prompt, f"city {number}") for number, prompt in enumerate(prompts))
    pairs = encode_answers(tokenizer, prompts, [edit.target for edit in edits])
    targets = [len(target) + 1 for _, target in pairs]
    tokens = [len(prompt) + more for (prompt, _), more in zip(pairs, targets)]
    sizes = {"tokens_per_edit": tokens, "target_tokens": targets, "batch_size": 16}
    train = phases(plan_edit(model.config, place, num_edits=32, **sizes))["train"]
    planned = sum(train.device.values()) - train.device["weights"] - train.device["adapter"]
    args = EditConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=16,
        num_train_epochs=2,  # Adam's moments are there from the second step on
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = EditTrainer(model=model, args=args, train_dataset=edits, processing_class=tokenizer, peft_config=place)
    assert planned + sum(train.cpu.values()) == pytest.approx(peak_of(trainer.train), rel=0.1)


def test_long_edits_take_no_more_than_their_share(make):
    # A matrix of scores would grow with the square of the length.
    config = make("llama").config
    short, long = (
        phases(plan_edit(config, PLACE, num_edits=200, tokens_per_edit=tokens, dtype="bfloat16"))["train"]
        for tokens in (16, 64)
    )
    assert long.device["activations and gradient"] < 4.1 * short.device["activations and gradient"]


def test_the_largest_batch_counts_for_memory_and_the_mean_for_operations(make):
    config = make("llama").config
    tokens = [8] * 90 + [40] * 10
    plan = plan_edit(config, PLACE, num_edits=100, tokens_per_edit=tokens, target_tokens=3, batch_size=10)
    largest = plan_edit(config, PLACE, num_edits=100, tokens_per_edit=40, target_tokens=3, batch_size=10)
    mean = plan_edit(config, PLACE, num_edits=100, tokens_per_edit=12, target_tokens=3, batch_size=10)  # of 11.2
    assert phases(plan)["train"].device == phases(largest)["train"].device
    assert phases(plan)["build cache"].device == phases(largest)["build cache"].device
    assert (plan.epoch_flops, plan.cache_flops) == (mean.epoch_flops, mean.cache_flops)
    assert plan.tokens == sum(tokens)
    assert phases(plan)["train"].cpu == {"cached states": sum(tokens) * HIDDEN * 4}


def test_a_large_cache_is_a_file(make):
    config = make("llama").config
    most = int(EditConfig.prefix_cache_memory * 2**30) // (20 * HIDDEN * 4)  # edits
    for edits, where in ((most, "cpu"), (most + 1, "disk")):
        plan = phases(plan_edit(config, PLACE, num_edits=edits))
        for name in ("build cache", "train"):
            held = {place: getattr(plan[name], place).get("cached states") for place in ("cpu", "disk")}
            assert held == {"cpu": None, "disk": None, where: edits * 20 * HIDDEN * 4}


def test_offloading_takes_the_lower_layers_off_the_device(make):
    model = make("llama")
    layer = size(model.model.layers[0])
    place = LocFTConfig(layers=[2])
    plain = phases(plan_edit(model.config, place, num_edits=8))
    off = phases(plan_edit(model.config, place, num_edits=8, offload_prefix=True))
    for name, there in {"load": 0, "build cache": 1, "train": 0, "evaluate": 1, "save": 0}.items():
        assert plain[name].device["weights"] == size(model)
        assert off[name].device["weights"] == size(model) - 2 * layer + there * layer
        rest = [{k: v for k, v in phase[name].device.items() if k != "weights"} for phase in (plain, off)]
        assert rest[0] == rest[1]
        if name != "load":
            assert off[name].cpu == {**plain[name].cpu, "layers below": 2 * layer}


def test_frozen_weights_are_rounded_beside_what_they_were(make):
    config = make("llama").config
    plan = phases(plan_edit(config, PLACE, num_edits=200, frozen_dtype="bfloat16"))
    wide, narrow = (phases(plan_edit(config, PLACE, num_edits=200, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    weights = plan_edit(config, PLACE, num_edits=200).weights
    train = plan["train"].device
    taken = [phase["train"].device["activations and gradient"] for phase in (wide, narrow)]
    assert taken[1] < 0.8 * taken[0]  # the logits stay in float32
    assert train.pop("rounded weights") == (sum(weights.values()) - weights["below"]) // 2
    assert train.pop("activations and gradient") == taken[1]
    assert train == {k: v for k, v in wide["train"].device.items() if k != "activations and gradient"}
    assert plan["train"].cpu["cached states"] == wide["train"].cpu["cached states"] // 2
    assert plan["build cache"].device == wide["build cache"].device
    # What is in 16 bits already stays as it is.
    again = plan_edit(config, PLACE, num_edits=200, dtype="bfloat16", frozen_dtype="float16")
    assert phases(again) == narrow


# ---- The place ----


def test_the_default_place_is_that_of_the_trainer(make):
    model = make("llama")
    plan = plan_edit(model.config, num_edits=8)
    assert plan == plan_edit(model.config, LocFTConfig.recommended(model), num_edits=8)


def test_a_trained_first_layer_leaves_nothing_to_store_or_to_offload(make):
    config = make("llama").config
    for place in (
        LocFTConfig(layers=[0]),
        LocFTConfig(layers=[1], target_modules=["mlp"], modules_to_save=["embed_tokens"]),
    ):
        plan = plan_edit(config, place, num_edits=8)
        assert not plan.prefix_cache and list(phases(plan)) == ["load", "train", "evaluate", "save"]
        assert plan.cache_flops == 0 and phases(plan)["train"].cpu == {}
        assert all(fit.plain and not fit.offloaded for fit in plan.cards)


def test_other_peft_methods_are_planned_too(make):
    lora = LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[1])
    plan = plan_edit(make("llama").config, lora, num_edits=8)
    assert plan.trained_parameters == 4 * (HIDDEN + INNER)
    assert phases(plan)["train"].device["adapter"] == 4 * plan.trained_parameters
    assert plan.prefix_cache


def test_what_is_given_stays_as_it_is(make):
    config, place = make("llama").config, LocFTConfig(layers=[-2])
    before = config.to_dict(), place.to_dict()
    plan_edit(config, place, num_edits=8, dtype="bfloat16")
    assert (config.to_dict(), place.to_dict()) == before


# ---- Large models, and cards ----


def test_72b_is_planned_from_its_config_alone(tmp_path):
    LARGE.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_edit(tmp_path, LocFTConfig(layers=[60]), num_edits=100_000)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**29  # the delta alone has 0.9 GiB
    embeddings = 152064 * 8192
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 29568 + 8192 + 2 * 1024 + 2 * 8192  # with biases and norms
    assert plan.parameters == 2 * embeddings + 80 * layer + 8192
    assert 145e9 < sum(plan.weights.values()) == 2 * plan.parameters < 146e9
    assert plan.weights["below"] == 2 * 60 * layer
    assert plan.trained_parameters == 8192 * 29568
    assert phases(plan)["train"].disk["cached states"] == 100_000 * 20 * 8192 * 2
    fits = {fit.card: (fit.plain, fit.offloaded) for fit in plan.cards}
    assert fits["RTX 4090"] == (False, False)
    assert fits["H100"] == fits["H200"] == (False, True)
    assert fits["B200"] == (True, True)


def test_a_card_fits_if_the_largest_phase_and_the_reserve_do():
    config = copy.deepcopy(LARGE)
    config.num_hidden_layers = 12
    config.layer_types = config.layer_types[:12]
    plan = plan_edit(config, LocFTConfig(layers=[8]), num_edits=1000)
    off = plan_edit(config, LocFTConfig(layers=[8]), num_edits=1000, offload_prefix=True)
    assert off.device_bytes < plan.device_bytes == max(sum(phase.device.values()) for phase in plan.phases)
    assert off.cards == plan.cards
    for fit in plan.cards:
        assert fit.plain == (plan.device_bytes + RESERVED <= fit.memory)
        assert fit.offloaded == (off.device_bytes + RESERVED <= fit.memory)
    assert len({(fit.plain, fit.offloaded) for fit in plan.cards}) == 3  # some with all, some without the lower layers


def test_0_6_gib_of_a_card_are_left_free():
    room = 80 * 10**9 - int(0.6 * 2**30)
    fits = {fit.card: (fit.plain, fit.offloaded) for fit in card_fits(room + 1, room)}
    assert fits["H100"] == (False, True) and fits["H200"] == (True, True) and fits["L40S"] == (False, False)


def test_a_plan_is_plain_values_in_json(make):
    plan = plan_edit(make("llama").config, PLACE, num_edits=8)
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["device_bytes"] == plan.device_bytes
    assert read["phases"][0]["device"] == phases(plan)["load"].device
    assert set(read["cards"][0]) == {"card", "memory", "plain", "offloaded"}
