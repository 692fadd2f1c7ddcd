/* "observation => action" lines, as people paste them. */

const ARROW = /\s*(?:=>|⇒|\t)\s*/;
export const MOST_PAIRS = 1000;

/** Parse pasted text to {pairs: [{observation, action}], problems: ["line 3: ..."]}. Empty lines are skipped. */
export function parsePairs(text) {
  const pairs = [];
  const problems = [];
  text.split(/\r?\n/).forEach((line, index) => {
    if (line.trim() === "") return;
    const arrow = line.match(ARROW);
    const observation = arrow ? line.slice(0, arrow.index).trim() : "";
    const action = arrow ? line.slice(arrow.index + arrow[0].length).trim() : "";
    if (!arrow) problems.push(`line ${index + 1} has no =>`);
    else if (observation === "" || action === "") problems.push(`line ${index + 1} needs text on both sides of =>`);
    else pairs.push({ observation, action });
  });
  return { pairs, problems };
}

/** "12 examples", or the first problems; for the line below the field. */
export function describePairs({ pairs, problems }) {
  const count = pairs.length === 0 ? "" : `${pairs.length} ${pairs.length === 1 ? "example" : "examples"}`;
  if (problems.length === 0) return count;
  const more = problems.length > 3 ? ` and ${problems.length - 3} more` : "";
  return `${count ? `${count}; ` : ""}${problems.slice(0, 3).join(", ")}${more}`;
}
