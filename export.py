"""Turn a checkpoint into a folder that Hugging Face transformers opens, with no network.

    python export.py --hf_dir=hf/mine                              the newest run under out/
    python export.py --init_from=nanogpt/out/ckpt.pt --hf_dir=hf/mine

    AutoModelForCausalLM.from_pretrained("hf/mine"); AutoTokenizer.from_pretrained("hf/mine")

The weights are the checkpoint's to the bit, and --init_from=hf/mine takes them back. nanoGPT adds rows beyond the
tokenizer's ids for speed; they are left out. GPT-2 has biases, so a model without them gets biases of zero.
"""

import errno
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lib import checkpoint, files, huggingface, settings, tokenizer
from lib.settings import UserError

from safetensors import SafetensorError
from safetensors.torch import save_file


@dataclass
class Settings:
    out_dir: str = ""  # the run to export; '' is the newest under out/
    init_from: str = ""  # instead of a run: a checkpoint, gpt2*, a Hugging Face folder; a,b: their mean; '' is the run
    hf_dir: str = ""  # the folder to write; it must not exist yet, or be empty


def find_tokenizer(opened):
    """The model's tokenizer, or None and a line that says why it is not known."""
    try:
        return tokenizer.load(tokenizer.spec_of_model(opened))
    except UserError as error:
        settings.say(f"without tokenizer files: {error}")
        return None


def model_files(opened, tok):
    """({name: contents} of the JSON files, state dict) of transformers' GPT2LMHeadModel."""
    hf_config, state = huggingface.convert(opened.model)
    eot = tok.eot if tok and tok.eot >= 0 else None
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
    if tok and tok.vocab_size < hf_config["vocab_size"]:
        rows = hf_config["vocab_size"] - tok.vocab_size
        settings.say(f"left out: {rows} rows of the vocabulary that no token has")
        hf_config["vocab_size"] = tok.vocab_size
        state["transformer.wte.weight"] = state["transformer.wte.weight"][: tok.vocab_size].clone()
    # By this name huggingface.load finds the tokenizer again, or why it is not known.
    named = {"tokenizer_spec": spec} if (spec := tok.spec if tok else opened.tokenizer) else {}
    return {"config.json": hf_config | ids | {"dtype": "float32"} | named, "generation_config.json": ids}, state


def write_folder(folder, contents, state):
    """Write the files {name: text or JSON} and the weights so that `folder` appears when it is whole.

    An empty folder that is there already may be a mount point, which can't be replaced. So the files are made in it,
    and config.json, without which nothing opens it, gets its name last. Raises OSError, SafetensorError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.exists()
    around = folder if inside else folder.parent
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=around))
    try:
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8", newline="")
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        for path in partial.iterdir():
            with open(path, "rb+") as f:  # Windows flushes no file that is open for reading alone.
                files.sync(f)
        os.chmod(partial, 0o777 & ~umask())  # mkdtemp and safetensors leave others no access.
        os.chmod(partial / "model.safetensors", 0o666 & ~umask())
        if inside:
            if os.listdir(folder) != [partial.name]:  # Another export may have come between.
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            for name in sorted(os.listdir(partial), key=lambda name: name == "config.json"):
                os.replace(partial / name, folder / name)
        else:
            os.replace(partial, folder)
        files.sync_folder(around)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def umask():
    """The permissions that the user takes from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main():
    s = settings.load(Settings, command_line_only=("init_from",))
    if not s.hf_dir:
        raise UserError("--hf_dir is missing; name the folder to write by --hf_dir=FOLDER")
    folder = Path(os.path.realpath(s.hf_dir))
    for part in (path := Path(os.path.abspath(s.hf_dir)), *path.parents):
        if os.path.lexists(part) and not part.exists():
            raise UserError(f"--hf_dir={s.hf_dir}: {part} is a link to what is not there; mount its disk, or remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--hf_dir={s.hf_dir} holds something already; name another folder, or remove this one")
    opened = checkpoint.open_run(s.out_dir, s.init_from)
    tok = find_tokenizer(opened)
    contents, state = model_files(opened, tok)
    try:
        write_folder(folder, contents | (huggingface.tokenizer_files(tok.spec) if tok else {}), state)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{s.hf_dir} can't be written ({error}); name another by --hf_dir=FOLDER") from None
    size = sum(path.stat().st_size for path in folder.iterdir())
    settings.say(f"{opened.name} -> {s.hf_dir}: {', '.join(sorted(os.listdir(folder)))}; {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    settings.run(main)
