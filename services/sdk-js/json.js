// Values to JSON. `JSON.stringify` leaves out or empties what has no JSON form; here that is refused.

const OPAQUE = [Map, Set, WeakMap, WeakSet, ArrayBuffer, Error, RegExp];

/** What keeps a value from having a JSON form, and what to do about it; or undefined. */
function problem(value) {
  switch (typeof value) {
    case 'number':
      return Number.isFinite(value) ? undefined : [String(value), 'JSON has no such number'];
    case 'bigint':
      return ['a BigInt', 'give a number or a text'];
    case 'function':
      return ['a function', 'give what it answers'];
    case 'symbol':
      return ['a symbol', 'give a text'];
    case 'object':
      break;
    default:
      return undefined;
  }
  if (value === null || Array.isArray(value)) return undefined;
  const prototype = Object.getPrototypeOf(value);
  if (prototype === Object.prototype || prototype === null) return undefined;
  if (ArrayBuffer.isView(value)) return [`a ${value[Symbol.toStringTag]}`, 'give an array or a text'];
  if (typeof value.then === 'function') return ['a promise', 'await it'];
  const type = OPAQUE.find((type) => value instanceof type);
  return type === undefined ? undefined : [`a ${type.name}`, 'give an object, an array or a text'];
}

/** Where in `value` something is that `isIt`, as a JSON Pointer. */
function find(value, isIt, path = '', seen = []) {
  if (isIt(value, seen)) return path === '' ? 'at its top' : `at ${path}`;
  if (value === null || typeof value !== 'object' || seen.includes(value)) return undefined;
  for (const [key, part] of Object.entries(value)) {
    const found = find(part, isIt, `${path}/${key.replace(/~/g, '~0').replace(/\//g, '~1')}`, [...seen, value]);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** The JSON text of `value`, or a thrown `{ code, message }` that says what has none, and where. */
export function toJson(value, what, refuse) {
  let wrong;
  const check = (key, part) => {
    wrong ??= problem(part);
    return part;
  };
  let text;
  try {
    text = JSON.stringify(value, check);
  } catch (error) {
    if (wrong === undefined) {
      const where = find(value, (part, seen) => seen.includes(part));
      if (where === undefined) throw error;
      throw refuse(`the ${what} is circular ${where}`);
    }
  }
  if (wrong !== undefined) {
    const where = find(value, (part) => problem(typeof part?.toJSON === 'function' ? part.toJSON() : part) !== undefined);
    throw refuse(`the ${what} has ${wrong[0]} ${where ?? 'somewhere'}: ${wrong[1]}`);
  }
  if (text === undefined) throw refuse(`the ${what} is undefined: give null where there is nothing to say`);
  return text;
}
