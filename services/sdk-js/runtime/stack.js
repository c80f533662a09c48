// Where an exception came from, in the files as they were written.
const FRAME = /^ *at (?:(.*) \()?(?:[^()]*\/)?component\.js:(\d+):\d+\)?$/;
let places;

/** Where a line of the component was written, or undefined for what the build and this package have added. */
function placeOf(line) {
  // The build puts them beside the code.
  places ??= JSON.parse(globalThis.__mbPlaces ?? '{"sources":[],"runs":[]}');
  const { sources, runs } = places;
  let [low, high] = [0, runs.length / 3];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (runs[middle * 3] <= line) low = middle + 1;
    else high = middle;
  }
  const [begin, source, written] = low === 0 ? [0, -1, 0] : runs.slice((low - 1) * 3, low * 3);
  return source === -1 ? undefined : `${sources[source]}:${written + line - begin}`;
}

function frames(stack) {
  const shown = [];
  for (const frame of stack.split('\n')) {
    const match = FRAME.exec(frame);
    if (match === null) continue;
    const place = placeOf(Number(match[2]));
    if (place !== undefined) shown.push(`    at ${match[1] ? `${match[1]} ` : ''}(${place})`);
  }
  return shown;
}

/** What was thrown, with its causes and where it came from. */
export function stackOf(error, depth = 0) {
  const lines = [`${error.name}: ${error.message}`];
  if (typeof error.stack === 'string') lines.push(...frames(error.stack));
  if (Array.isArray(error.errors) && depth < 3) {
    for (const one of error.errors.slice(0, 5)) if (one instanceof Error) lines.push(stackOf(one, depth + 1));
  }
  if (error.cause instanceof Error && depth < 3) lines.push(`caused by ${stackOf(error.cause, depth + 1)}`);
  return lines.join('\n');
}
