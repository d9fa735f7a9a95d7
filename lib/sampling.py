"""Samples while a model learns: how it goes on with the beginning of the validation text."""

import unicodedata

from lib import data, tokenizer

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PROMPT = 32  # ids of the validation text that are read


@torch.no_grad()
def continuation(model, dataset, s, rt, step):
    """The beginning of the validation text, and after a bar what the model goes on with: s.sample_tokens ids, as text.

    The draws have a generator of their own, so that the bits of the run do not change. Raises UserError for a
    vocabulary that is not installed here.
    """
    tok = tokenizer.load(dataset.tokenizer_spec)
    ids = dataset.validation_ids()[: min(PROMPT, s.block_size)].tolist()
    generator = torch.Generator(rt.device).manual_seed(data.seed_of(s.seed, step))
    options = dict(temperature=0.8, top_k=200, eot=tok.eot, vocab_size=tok.vocab_size, generator=generator)
    was_training = model.training
    model.eval()
    # A compiled graph would be made anew for each length, and so would cuDNN's plan of attention.
    with rt.autocast(), torch.compiler.set_stance("force_eager"), sdpa_kernel(WITHOUT_CUDNN):
        drawn = [i.item() for i in model.generate(torch.tensor([ids], device=rt.device), s.sample_tokens, **options)]
    model.train(was_training)
    drawn = drawn[: drawn.index(tok.eot)] if tok.eot in drawn else drawn
    text = "|".join(tok.decode(part).decode("utf-8", "replace") for part in (ids, drawn))
    # A model that has learned little draws control characters too, which a terminal would obey.
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
