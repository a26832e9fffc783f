"""Causal tracing as it is written down: one pass of the whole model for each restored state."""

from contextlib import ExitStack, contextmanager

import torch


# A subject of several tokens, with tokens before it and behind it.
PROMPT = "What is the capital of Ulaanbaatarland? It is called"
SUBJECT = "Ulaanbaatarland"
# Where the layers are, and what the attention and the MLP of a layer are called.
PARTS = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma3": ("model.layers", "self_attn", "mlp"),
    "qwen3": ("model.layers", "self_attn", "mlp"),
    "mixtral": ("model.layers", "self_attn", "mlp"),
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
    "falcon": ("transformer.h", "self_attention", "mlp"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "mamba": ("backbone.layers", None, None),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def make_noise(model, subject, copies, scale=None):
    """The noise that tracing documents: of a CPU generator, three times the deviation of the subject's embeddings."""
    embedded = model.get_input_embeddings()(torch.tensor([subject]))[0]
    scale = 3 * embedded.std() if scale is None else scale
    return scale * torch.randn(copies, *embedded.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_effects(model, architecture, ids, begin, noise, answer, window, cells=None):
    """Effects by kind, token and layer; or of some (kind, token, layer) only, in a list."""
    name, attention, mlp = PARTS[architecture]
    layers = list(model.get_submodule(name))
    named = {"states": "", "mlp": mlp, "attention": attention}
    modules = {
        kind: [layer.get_submodule(part) for layer in layers] for kind, part in named.items() if part is not None
    }
    clean = {}
    width = len(ids)

    def keep(module, args, output):
        clean[module] = first(output).reshape(1, width, -1)[0].clone()

    with ExitStack() as stack:
        for kind in modules:
            for module in modules[kind]:
                stack.enter_context(hooked(module, keep))
        model(torch.tensor([ids]), use_cache=False)

    def corrupt(module, args, output):
        output = output.clone()
        output[:, begin : begin + noise.shape[1]] += noise
        return output

    def restore(token):
        def hook(module, args, output):
            rows = first(output).clone().reshape(len(noise), width, -1)
            rows[:, token] = clean[module][token]
            rows = rows.reshape(first(output).shape)
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        return hook

    def probability(kind=None, token=None, restored=()):
        with ExitStack() as stack:
            stack.enter_context(hooked(model.get_input_embeddings(), corrupt))
            for layer in restored:
                stack.enter_context(hooked(modules[kind][layer], restore(token)))
            logits = model(torch.tensor([ids] * len(noise)), use_cache=False).logits[:, -1]
        return logits.softmax(-1)[:, answer].mean()

    def effect(kind, token, layer):
        if kind == "states":
            restored = [layer]
        else:  # as in ROME's code: max(0, layer - window // 2) up to min(layers, layer - (-window // 2))
            restored = range(max(0, layer - window // 2), min(len(layers), layer - (-window // 2)))
        return (probability(kind, token, restored) - corrupted).item()

    corrupted = probability()
    if cells is not None:
        return [effect(*cell) for cell in cells]
    return {
        kind: torch.tensor([[effect(kind, token, layer) for layer in range(len(layers))] for token in range(width)])
        for kind in modules
    }
