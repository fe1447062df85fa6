"""The audit in words, for people: a table that leaves nothing out, and a verdict for each concept."""

from collections.abc import Sequence

from sae_core.safety.audit import RIGHT, ConceptAudit, Rated

CAVEATS = """What these numbers do not show: a feature that is silent proves nothing, as a model may carry the same
content in other features, or in what the dictionary leaves unexplained. That a feature exists does not make a model
dangerous: any model that can read about a thing represents it. An AUC says that a number tells these prompts apart, not
what the feature means, and not that the model acts on it."""


def verdict(found: ConceptAudit) -> str:
    """What was shown for a concept, and what was not, in plain words."""
    best = found.best
    if best is None:
        return "No feature fires on its prompts."
    s = best.separating
    name = f"feature {s.feature}" + (f' ("{s.label}")' if s.label else "")
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
    return " ".join(part for part in (said, _meaning(found), _against(found), _shifted(found)) if part)


def _meaning(found: ConceptAudit) -> str:
    """Whether the feature is the concept's own, as far as the pattern can tell."""
    if found.status == "not found" or found.best is None:
        return ""
    share = found.best.specificity.share
    if share is None:
        return "It has no examples on the corpus."
    told = f"Of its firings on the corpus, about {share:.0%} are in text about it, by a pattern of words"
    return told + ("." if share >= RIGHT else ": it stands for something else that these prompts share.")


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


def markdown(audits: Sequence[ConceptAudit], dictionary: str, lost: Sequence[str] = ()) -> str:
    """The whole report."""
    parts = [f"`{dictionary}`\n", CAVEATS + "\n"]
    if lost:
        parts.append(f"**Lost since the audit before: {', '.join(lost)}.**\n")
    for kind, title in (("calibration", "What any method should find"), ("safety", "What a safety team asks for")):
        chosen = [found for found in audits if found.kind == kind]
        if chosen:
            parts += [f"### {title}\n", _table(chosen), "", *(f"- **{a.concept}**: {verdict(a)}" for a in chosen), ""]
    parts += ["### Monitors\n", _monitors(audits), ""]
    return "\n".join(parts)


def _table(audits: Sequence[ConceptAudit]) -> str:
    """One row a concept; AUCs on unseen prompts."""
    head = (
        "| concept | verdict | feature | label | AUC (interval) | firings about it | right one | probe | words "
        "| random (top 5%) | elsewhere: feature, probe, words |\n|" + " --- |" * 11
    )
    return "\n".join([head, *(_row(found) for found in audits)])


def _row(found: ConceptAudit) -> str:
    best = found.best
    if best is None:
        return f"| {found.concept} | {found.status} |" + " |" * 9
    s = best.separating
    share = best.specificity.share
    right = f"rank {found.right_rank}" if found.right_rank else "none"
    cells = [
        found.concept, found.status, str(s.feature), s.label.replace("|", "\\|"), _auc(best.rated),
        "-" if share is None else f"{share:.0%}", right, _auc(found.probe), _auc(found.words),
        f"{found.random.mean:.2f} ({found.random.high:.2f})",
        ", ".join(f"{r.auc:.2f}" for r in (best.shifted, found.shifted_probe, found.shifted_words) if r) or "-",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


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
    return "\n".join([head, *rows])
