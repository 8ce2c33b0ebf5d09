"""Makes a site of docs/ as it is: brings in the pages that lie elsewhere, and whatever pages link to out of docs/.

On GitHub a link such as ../results/RUN leads into the repository. Here it leads to a page of its own, made of what lies
there, so that the site is whole wherever it is read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path, PurePosixPath
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".toml": "toml", ".txt": "text"}
LINK = re.compile(r"(?<=\]\()([^()#\s:]+)(#[^()\s]*)?(?=\))")
CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
WORD = re.compile(r"(?<!\S)(?=\S*-)\S{3,30}(?!\S)")
FENCE = "`" * 8
# What a browser would fetch by itself from somewhere else.
FETCHED = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def in_site(path: str) -> str:
    """Where the site has what the repository has at this path."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" + (".md" if PurePosixPath(path).suffix in LANGUAGES else "")


def in_repository(src_uri: str) -> str:
    """The inverse of `in_site`."""
    for path, uri in ELSEWHERE.items():
        if uri == src_uri:
            return path
    if not src_uri.startswith("repository/"):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix("repository/").removesuffix("/index.md")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def targets(path: str, text: str) -> dict[str, str]:
    """The links of a file's Markdown that lead to something in the repository: each as written, and the path."""
    base = (ROOT / path) if (ROOT / path).is_dir() else (ROOT / path).parent
    found = {}
    for link, _ in LINK.findall(text):
        there = Path(os.path.normpath(base / link))
        if there.is_relative_to(ROOT) and there.exists():
            found[link] = there.relative_to(ROOT).as_posix()
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages of docs/ link to, what that links to, and so on."""
    here = {in_repository(file.src_uri): file.content_string for file in files.documentation_pages()}
    todo = [*here, *ELSEWHERE]
    seen = set(todo)
    for path in todo:  # grows meanwhile
        text = here[path] if path in here else markdown_of(path)
        if (uri := in_site(path)) not in files.src_uris:
            config.watch.append(str(ROOT / path))
            if text is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            else:
                files.append(File.generated(config, uri, content=text))
        further = [there for there in targets(path, text or "").values() if there not in seen]
        todo += dict.fromkeys(further)
        seen |= set(further)
    return files


def markdown_of(path: str) -> str | None:
    """What stands on the page of a file or folder; None for a file that is handed on as it is."""
    there = ROOT / path
    if there.is_dir():
        return folder(there)
    if there.suffix == ".md":
        return there.read_text()
    if there.suffix not in LANGUAGES:
        return None
    return f"# {path}\n\n{FENCE}{LANGUAGES[there.suffix]}\n{there.read_text().rstrip()}\n{FENCE}\n"


def folder(there: Path) -> str:
    """A folder's page: how a run in it was made, and its files."""
    lines = [f"# {there.relative_to(ROOT)}", ""]
    if (there / "run.json").exists():
        lines += run(json.loads((there / "run.json").read_text()))
    for path in sorted(there.iterdir()):
        if path.is_file() and path.name != "__init__.py":
            lines.append(f"- [{path.name}]({path.name}), {path.stat().st_size / 1024:.0f} KiB")
        elif (path / "__init__.py").exists():
            lines.append(f"- [{path.name}/]({path.name})")
    return "\n".join(lines)


def run(meta: dict) -> list[str]:  # type: ignore[type-arg]
    """What run.json says of how a run was made."""
    machine, told = meta.get("machine", {}), shlex.join(meta["command"])
    libraries = ", ".join(f"{name} {version}" for name, version in machine.get("libraries", {}).items())
    rows = {
        "machine": f"{machine.get('cpu')}, {machine.get('usable_threads')} threads, {machine.get('system')}",
        "kernels that torch picks": machine.get("cpu_capability"),
        "variables set": ", ".join(f"{k}={v}" for k, v in machine.get("environment", {}).items()) or "none",
        "with": f"Python {machine.get('python')}, {libraries}",
    }
    return [
        f"{FENCE}sh\n{told}\n{FENCE}", "",
        f"| measured | {meta['started'][:16].replace('T', ' ')} UTC |", "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items() if value), "",
        f"At the root of a clone `attnbench show results/{meta['name']}` prints its numbers.", "",
    ]  # fmt: skip


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links go where the site has what they lead to; what was brought in from the repository is not searched."""
    if page.file.src_uri.startswith("repository/"):
        page.meta["search"] = {"exclude": True}
    found = targets(in_repository(page.file.src_uri), markdown)
    here = PurePosixPath(page.file.src_uri).parent.as_posix()
    return LINK.sub(lambda m: relpath(in_site(found[m[1]]), here) + (m[2] or "") if m[1] in found else m[0], markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In code no line breaks behind a hyphen: --out is one word, which no style sheet can say."""
    return CODE.sub(lambda found: WORD.sub(r'<span class="whole">\g<0></span>', found[0]), html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises: PluginError: the page would fetch something from a network."""
    if fetched := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} is not for readers offline: {fetched[0]}")
    return output
