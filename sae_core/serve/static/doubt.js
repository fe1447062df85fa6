// A label that does not beat its control is marked wherever it is shown: `labels.reader.doubted`, for scripts.

export const NO_BETTER = "no better than another's label";

/** A label as text shows it. */
export const doubted = (label, beatsControl) => (beatsControl === false ? `${label} (${NO_BETTER})` : label);

/** A shown label in two: the label itself, and whether it is marked. */
export function parted(shown) {
  const mark = ` (${NO_BETTER})`;
  return shown.endsWith(mark) ? [shown.slice(0, -mark.length), true] : [shown, false];
}
