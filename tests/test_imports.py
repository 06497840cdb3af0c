"""Who may import whom (the layout in DESIGN.md), held through every chain of imports; and who may know of flags."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("kernels", "fmfl_jax", "launch")
MODELS = ("fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.quant", "fmfl_jax.experiment", "flax")
ENGINES = tuple(
    f"fmfl_jax.experiment.{name}"
    for name in (
        *("loop", "build", "network", "evaluation", "report", "case_study", "cross_device", "plan", "plan_services"),
        "pretrain",
    )
)
# module or package -> what it must not reach, in itself or through what it imports
FORBIDDEN = {
    "kernels": ("fmfl_jax", "launch", "flax", "absl"),
    "fmfl_jax": ("launch", "absl"),
    "fmfl_jax.fed": (*MODELS, "fmfl_jax.wireless", "fmfl_jax.services"),
    "fmfl_jax.wireless": (*MODELS, "fmfl_jax.fed", "fmfl_jax.transport", "fmfl_jax.services"),
    "fmfl_jax.transport": (*MODELS, "fmfl_jax.fed", "fmfl_jax.wireless", "fmfl_jax.services", "fmfl_jax.data"),
    "fmfl_jax.services": MODELS,
    "fmfl_jax.data": (*MODELS, "fmfl_jax.fed", "fmfl_jax.wireless", "fmfl_jax.transport", "fmfl_jax.services", "jax"),
    "fmfl_jax.quant": ("fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.experiment", "fmfl_jax.fed", "flax"),
    "fmfl_jax.models": ("fmfl_jax.peft", "fmfl_jax.experiment", "fmfl_jax.fed", "fmfl_jax.wireless"),
    "fmfl_jax.models.classifiers": (*MODELS, "fmfl_jax.fed", "fmfl_jax.wireless"),
    "fmfl_jax.experiment": ("fmfl_jax.deploy",),
    "fmfl_jax.deploy.channel": ("jax", "fmfl_jax.fed", "fmfl_jax.experiment"),  # each of Flower's messages imports it
    "fmfl_jax.deploy.secagg_plus_client": ("jax", "fmfl_jax.fed", "fmfl_jax.experiment"),
    "fmfl_jax.peft": ("fmfl_jax.experiment", "fmfl_jax.fed", "fmfl_jax.wireless"),
    "fmfl_jax.experiment.config": ENGINES,
    "fmfl_jax.experiment.methods": (*ENGINES, "fmfl_jax.experiment.config", "fmfl_jax.models", "fmfl_jax.peft"),
}
# with flags of their own
SCRIPTS = {"kernels.w4a16.bench", "kernels.w4a16.cpu.bench", "kernels.w4a16.predict", "kernels.w4a16.tune"}
# `import fmfl_jax` looks its public names up when they are asked for: the names themselves are no imports.


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Every module of ours by its name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(text: str) -> set[str]:
    """The modules that a program imports: of "from a import b" a, and a.b, which may be one."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def reached(start: str, imports: dict[str, set[str]]) -> dict[str, list[str]]:
    """{module: chain of imports that leads to it} from `start`, with the packages that each import runs."""
    chains, waiting = {}, [(start, [start])]
    while waiting:
        name, chain = waiting.pop()
        for target in imports.get(name, ()):
            parts = target.split(".")
            for length in range(1, len(parts) + 1):  # importing a.b runs a too
                step = ".".join(parts[:length])
                if step not in chains:
                    chains[step] = [*chain, step]
                    waiting.append((step, chains[step]))
    return chains


@functools.cache
def our_imports() -> dict[str, set[str]]:
    return {name: imports_of(path.read_text(encoding="utf-8")) for name, path in modules().items()}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_directions_through_every_chain(package):
    members = [name for name in modules() if under(name, package) and name not in SCRIPTS]
    assert members, f"no module is {package}"
    for member in members:
        for name, chain in reached(member, our_imports()).items():
            for forbidden in FORBIDDEN[package]:
                wrong = under(name, forbidden) and not under(name, package)
                assert not wrong, " -> ".join(chain)


def test_a_chain_is_followed_through_other_modules_and_their_packages():
    imports = {"a": {"b.c"}, "b": {"d"}, "b.c": {"e"}, "d": {"f.g"}, "x": {"y"}}
    assert set(reached("a", imports)) == {"b", "b.c", "d", "e", "f", "f.g"}
    assert reached("a", imports)["f.g"] == ["a", "b", "d", "f.g"]
    assert imports_of("from a.b import c\nimport d.e") == {"a.b", "a.b.c", "d.e"}


def test_configurations_take_only_configurations_from_the_models_side():
    """A PEFT's dataclass stands beside its layers, so the module is reached; nothing else of it is taken, but for what
    checks a model's dimensions."""
    sides, taken = ("fmfl_jax.models", "fmfl_jax.peft", "fmfl_jax.quant"), set()
    for name, targets in our_imports().items():
        if under(name, "fmfl_jax.experiment.config"):
            taken |= {t.rpartition(".")[2] for t in targets - set(modules()) if any(under(t, side) for side in sides)}
    taken -= {"check_context", "check_cut", "lora_targets"}
    assert taken and all(name.endswith("Config") for name in taken)


def test_commands_do_not_wait_for_scipy():
    """Its statistics and optimizers are a third of what a command would wait for: who needs one imports it in the
    function that does."""
    at_once = {}
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        at_once[name] = imports_of(ast.unparse(tree))
    for start in ("fmfl_jax.experiment.case_study", "fmfl_jax.experiment.cross_device"):
        for name, chain in reached(start, at_once).items():
            assert not any(under(name, slow) for slow in ("scipy", "dp_accounting")), " -> ".join(chain)
