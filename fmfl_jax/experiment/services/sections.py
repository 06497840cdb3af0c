"""The sections of the report beside its table: the FM as evaluator, alignment, and how far answers can be trusted."""

import pathlib

import numpy as np

from fmfl_jax.experiment.report.pyplot import files_only, save


def markdown(cells: list[list[str]]) -> str:
    """A table, its columns aligned; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def number(value: float | None, form: str) -> str:
    """ "-" for None: it does not apply, or nothing could show it."""
    return "-" if value is None else format(value, form)


def spread(seeds: list[dict], path: tuple, form: str) -> str:
    """The figure at `path` of each seed's record: mean ± sd (n - 1) over the seeds that have it, the mean alone where
    all agree, "-" where none has it."""
    found = []
    for one in seeds:
        for name in path:
            one = one[name]
        found.append(one)
    known = [value for value in found if value is not None]
    if not known:
        return "-"
    mean = format(float(np.mean(known)), form)
    return mean if len(set(known)) == 1 else f"{mean} ± {float(np.std(known, ddof=1)):{form}}"


def evaluation_text(found: dict) -> str:
    """III-C's figures as Markdown."""
    lines = ["", "The FM as evaluator (section III-C):", ""]
    for name, seeds in found["students"].items():
        figure = lambda key, form=".3f", seeds=seeds: spread(seeds, (key,), form)
        lines.append(
            f"- {name}: accuracy {figure('true')}; by {found['num_labelled']} labels {figure('labelled')}, interval "
            f"{figure('labelled_width')} wide; with the FM {figure('ppi')}, {figure('ppi_width')} wide, worth "
            f"{figure('effective_labels', '.0f')} labels; by agreement alone {figure('agreement_accuracy')}"
        )
    covered = spread(found["coverage"], ("share",), ".1%")
    lines.append(f"- intervals of 95 % cover {covered} of {found['draws']} draws of labelled rows")
    alarm = found["overfitting"]
    lines.append(
        f"- over-fitting alarm at p < 0.05: {alarm['caught']} of {alarm['students']} students of 100 epochs on "
        f"{alarm['few_rows']} rows, {alarm['false_alarms']} of {alarm['students']} on {alarm['many_rows']} rows; "
        f"area under the ROC {number(alarm['auroc'], '.3f')}"
    )
    return "\n".join(lines)


def alignment_text(found: dict, seeds: list[dict]) -> str:
    """III-D's figures as Markdown. found: their means and what the FM wrote; seeds: each seed's."""
    groups = list(next(iter(found["models"].values()))["accuracy"])
    cells = [["model", *(f"{group} ({found['groups'][group]})" for group in groups), "gap", "TPR gap"]]
    cells[0] += ["flips, genders", "right both ways", "flips, names", "right both ways"]
    for name, one in found["models"].items():
        figure = lambda *path, form=".3f", name=name: spread(seeds, ("models", name, *path), form)
        line = [name, *(figure("accuracy", group) for group in groups)]
        line += [figure("accuracy_gap"), figure("true_positive_gap")]
        for kind in ("genders", "names"):
            swap = f"swapped_{kind}"
            line.append(f"{figure(swap, 'flip_rate', form='.1%')} of {one[swap]['num_changed']}")
            line.append(figure(swap, "robust_accuracy"))
        cells.append(line)
    lines = ["", "Alignment (section III-D), accuracy on texts that mention women, men, both or neither:", ""]
    lines.append(markdown(cells))
    text = found["text"]
    if text is None:
        return "\n".join([*lines, "", "- no text was written: its bias and toxicity are unknown"])
    words = ", ".join(f"{count} {group}" for group, count in text["words"].items())
    toxic = text["toxicity"]
    lines += [
        "",
        f"- {text['texts']} texts that the FM wrote: words {words}, bias {number(text['bias'], '.3f')}; by profession "
        f"{number(text['stereotype'], '.3f')} (mean of {len(text['by_profession'])})",
        "- toxicity: "
        + (
            "unknown, no scorer"
            if toxic is None
            else f"{toxic['toxic_share']:.1%} of the texts, mean {toxic['mean_score']:.3f}"
        )
        + f"; expected maximum {number(text['expected_maximum_toxicity'], '.3f')}",
    ]
    return "\n".join(lines)


def trust_text(found: dict, seeds: list[dict]) -> str:
    """II-B's figures as Markdown. found: their means and the FM's own text; seeds: each seed's."""
    cells = [["model", "accuracy", f"ECE ({found['bins']} bins)", "Brier", "AUROC", "AURC"]]
    coverages = list(next(iter(found["models"].values()))["accuracy_at"])
    cells[0] += [f"surest {float(c):.0%}" for c in coverages[1:]]
    cells[0] += [f"sets at {1 - found['alpha']:.0%}: cover", "size"]
    for name in found["models"]:
        figure = lambda *path, form=".3f", name=name: spread(seeds, ("models", name, *path), form)
        line = [name, *map(figure, ("accuracy", "ece", "brier", "auroc", "aurc"))]
        line += [figure("accuracy_at", c) for c in coverages[1:]]
        cells.append(line + [figure("conformal_coverage"), figure("conformal_size", form=".2f")])
    lines = ["", f"How far answers can be trusted (section II-B), on {found['rows']} rows:", "", markdown(cells), ""]
    for name, one in found["models"].items():
        if "deferral" in one:
            each = [
                f"{share:.0%}: {spread(seeds, ('models', name, 'deferral', i, 1), '.3f')}"
                for i, (share, _) in enumerate(one["deferral"])
            ]
            lines.append(f"- {name}, its least sure answers sent to the FM, accuracy by their share: {', '.join(each)}")
    text = found["text"]
    if text is not None:
        planted = text["planted"]
        lines += [
            f"- {text['questions']} questions, {text['samples']} samples each: {text['accuracy']:.3f} of the "
            f"majorities right, {number(text['accuracy_answered'], '.3f')} of the {text['answered']} answered; wrong "
            f"ones told by the entropy (AUROC {number(text['auroc'], '.3f')}) and by SelfCheckGPT's n-grams "
            f"({number(text['auroc_ngram'], '.3f')})",
            f"- a planted falsehood is repeated in {planted['falsehood_share']:.0%} of the samples, entropy "
            f"{planted['entropy']:.3f}: {'caught' if planted['caught'] else 'consistency misses it'}",
        ]
    return "\n".join(lines)


def plot_trust(directory: pathlib.Path, found: dict) -> None:
    """risk_coverage.png and deferral.png."""
    for name, key, labels in (
        ("risk_coverage", "curve", ("coverage", "share of errors")),
        ("deferral", "deferral_curve", ("share sent to the FM", "accuracy")),
    ):
        fig, ax = files_only().subplots(figsize=(6, 4), layout="constrained")
        for model, one in found["models"].items():
            if key in one:
                ax.plot(*one[key], label=model, linewidth=1)
        ax.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        save(fig, directory / f"{name}.png", dpi=110)
