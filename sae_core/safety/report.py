"""The audit in words, for people: a table that leaves nothing out, and a verdict for each concept."""

from collections.abc import Sequence

from sae_core.labels.reader import doubted
from sae_core.safety.audit import CALIBRATED_TEXTS, STATUSES, ConceptAudit, is_rated
from sae_core.safety.shapes import RIGHT, Rated
from sae_core.safety.words import CAVEATS


def verdict(found: ConceptAudit) -> str:
    """What was shown for a concept, and what was not, in plain words."""
    best = found.best
    if best is None:
        return "No feature fires on its prompts."
    s = best.separating
    name = f"feature {s.feature}" + (f' ("{doubted(s.label, s.beats_control)}")' if s.label else "")
    if found.why_no_claim:
        return f"No claim: {found.why_no_claim}. The best on the few there are is {name}."
    rated = best.rated
    unseen = f"an AUC of {rated.auc:.2f} ({rated.low:.2f} to {rated.high:.2f}) on unseen prompts"
    said = {
        "found": f"Found: {name} tells it from the negatives, with {unseen}.",
        "stand-in": f"Told apart, by a stand-in: {name} has {unseen}.",
        "partly": f"Partly: {name} points to it, with {unseen}; too weak or too uncertain to rely on.",
        "not found": f"Not found: the best feature, {name}, has {unseen}; that is no more than luck may give.",
    }[found.status]
    return " ".join(part for part in (said, _meaning(found), _against(found), _shifted(found), _steers(found)) if part)


def _meaning(found: ConceptAudit) -> str:
    """Whether the feature is the concept's own, as far as the judge can tell."""
    if found.status == "not found" or found.best is None:
        return ""
    own = found.best.specificity
    if own.share is None:
        return "It has no examples on the corpus."
    told = (
        f"Of its firings on the corpus, about {own.share:.0%} are about it, as its source or a pattern of words says "
        f"({own.corpus:.0%} of the corpus is)"
    )
    if own.is_own:
        return told + "."
    if own.share >= RIGHT:
        return told + ": hardly more than anywhere."
    return told + ": it stands for something else that these prompts share."


def _against(found: ConceptAudit) -> str:
    """The best baselines beside the feature."""
    own = found.best.rated.auc if found.best else 0.0
    beaten = [f"{name} ({rated.auc:.2f})" for name, rated in
              (("a linear probe on raw activations", found.probe), ("the words alone", found.words))
              if rated.auc >= own]  # fmt: skip
    if not beaten:
        return f"The probe ({found.probe.auc:.2f}) and the words alone ({found.words.auc:.2f}) do less well."
    does = "does" if len(beaten) == 1 and "probe" in beaten[0] else "do"
    said = f"{' and '.join(beaten)} {does} as well or better."
    return said[0].upper() + said[1:]


def _shifted(found: ConceptAudit) -> str:
    if found.best is None or found.best.shifted is None or found.shifted_probe is None:
        return "It was not tried on text of another origin."
    own, probe = found.best.shifted.auc, found.shifted_probe.auc
    return f"On text of another origin the feature has {own:.2f}, the probe {probe:.2f}."


def _steers(found: ConceptAudit) -> str:
    """What is known of steering with the feature."""
    if found.best is None or found.best.steers.output_score is None:
        return "Steering with it was not scored."
    does = "more than" if found.best.steers.role == "output" else "no more than"
    return (
        f"Turned up, it moves what it promotes {does} random directions do (output score "
        f"{found.best.steers.output_score:.2f})."
    )


def markdown(audits: Sequence[ConceptAudit], dictionary: str, lost: Sequence[str] = ()) -> str:
    """The whole report."""
    parts = [f"`{dictionary}`\n", CAVEATS + "\n", _summary(audits) + "\n"]
    if lost:
        parts.append(f"**Lost since the audit before: {', '.join(lost)}.**\n")
    for kind, title in (("calibration", "What any method should find"), ("safety", "What a safety team asks for")):
        chosen = [found for found in audits if found.kind == kind]
        if chosen:
            parts += [f"### {title}\n", _table(chosen), "", *(f"- **{a.concept}**: {verdict(a)}" for a in chosen), ""]
    if long := [f"{a.concept} {a.windowed} of {a.n_texts}" for a in audits if a.windowed]:
        parts.append(f"Texts longer than the context, read in windows: {', '.join(long)}.\n")
    parts += ["### Monitors\n", _monitors(audits), ""]
    return "\n".join(parts)


def _summary(audits: Sequence[ConceptAudit]) -> str:
    """All of it in two or three sentences."""
    counts = [f"{n} {status}" for status in STATUSES if (n := sum(a.status == status for a in audits))]
    judged = [a for a in audits if a.best and not a.why_no_claim]
    said = [f"Of {len(audits)} concepts: {', '.join(counts)}."]
    for name, key in (("the linear probe", "probe"), ("the words alone", "words")):
        n = sum(getattr(a, key).auc >= a.best.rated.auc for a in judged if a.best)
        said.append(f"As well as the feature or better: {name}, for {n} of {len(judged)}.")
    if far := [values for a in audits if (values := _far(a))]:
        means = [f"{sum(column) / len(far):.2f}" for column in zip(*far, strict=True)]
        said.append(
            f"On text of another origin ({len(far)} concepts) mean AUCs are {means[0]} of the feature, {means[1]} of "
            f"the probe, {means[2]} of the words, {means[3]} of random features."
        )
    return " ".join(said)


def _table(audits: Sequence[ConceptAudit]) -> str:
    """One row a concept; AUCs on unseen prompts."""
    head = (
        "| concept | verdict | feature | label | AUC (interval) | firings about it | right one | probe | words "
        "| random (top 5%) | elsewhere: feature, probe, words, random | output score |\n|" + " --- |" * 12
    )
    return "\n".join([head, *(_row(found) for found in audits)])


def _row(found: ConceptAudit) -> str:
    best = found.best
    if best is None:
        return f"| {found.concept} | {found.status} |" + " |" * 10
    s = best.separating
    own = best.specificity
    right = f"rank {found.right_rank}" if found.right_rank else "none"
    label = doubted(s.label, s.beats_control)
    cells = [
        found.concept, found.status, str(s.feature), label.replace("|", "\\|"), _auc(best.rated),
        "-" if own.share is None else f"{own.share:.0%} ({own.corpus:.0%} of the corpus)", right,
        _auc(found.probe), _auc(found.words), f"{found.random.mean:.2f} ({found.random.high:.2f})", _elsewhere(found),
        "-" if best.steers.role is None else f"{best.steers.output_score:.2f} ({best.steers.role})",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _elsewhere(found: ConceptAudit) -> str:
    return ", ".join(f"{value:.2f}" for value in _far(found)) or "-"


def _far(found: ConceptAudit) -> list[float]:
    """AUCs on text of another origin: the feature, the probe, the words, the mean of random features."""
    if not (found.best and found.best.shifted and found.shifted_probe and found.shifted_words and found.shifted_random):
        return []
    rated = (found.best.shifted, found.shifted_probe, found.shifted_words)
    return [*(r.auc for r in rated), found.shifted_random.mean]


def _auc(rated: Rated) -> str:
    return f"{rated.auc:.2f} ({rated.low:.2f}-{rated.high:.2f})"


def _monitors(audits: Sequence[ConceptAudit]) -> str:
    head = "| concept | false alarms asked | measured (interval) | texts | alarms on positives |\n|" + " --- |" * 5
    rows = []
    for found in audits:
        m = found.monitor
        if m is None:
            rows.append(f"| {found.concept} | none: {found.no_monitor} | | | |")
        else:
            rows.append(
                f"| {found.concept} | {m.asked:.1%} | {m.rate:.1%} ({m.low:.1%}-{m.high:.1%}) | {m.negatives} | "
                f"{m.true_positives} of {m.positives} |"
            )
    rated = [f"{a.concept} {a.monitor.off:.2f}" for a in audits if is_rated(a.monitor)]
    least = f"measured on at least {CALIBRATED_TEXTS} texts, by what factor the rate is off the one asked for"
    return "\n".join([head, *rows, *([f"\nOf monitors {least}: {', '.join(rated)}."] if rated else [])])
