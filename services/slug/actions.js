// Texts to URL slugs, without the server: tested with plain Node.

/** A refusal of the service's own. */
export class Refusal extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

// What does not come apart into a letter and its marks.
const LETTERS = { ß: 'ss', æ: 'ae', œ: 'oe', ø: 'o', ł: 'l', đ: 'd', þ: 'th', ð: 'd' };

/** Letters without marks, digits, and single dashes between them; at most `longest` characters. */
export function slug(text, longest) {
  const plain = text
    .toLowerCase()
    .normalize('NFKD')
    .replace(/[\u0300-\u036f]/g, '')
    .replace(/[ßæœøłđþð]/g, (letter) => LETTERS[letter]);
  const made = plain.replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, '');
  return made.slice(0, longest).replace(/-$/, '');
}

/** The text of `{"text"}`, and its slug. */
export function make(request, longest) {
  if (typeof request?.text !== 'string') throw new Refusal('INVALID_ARGUMENTS', 'text must be a text');
  const made = slug(request.text, longest);
  if (made === '') throw new Refusal('NOTHING_LEFT', 'no letter and no digit is in the text');
  return made;
}

/** The first of slug, slug-2, slug-3 … that is not taken. */
export function unique(made, isTaken) {
  for (let number = 1; number <= 1000; number += 1) {
    const candidate = number === 1 ? made : `${made}-${number}`;
    if (!isTaken(candidate)) return candidate;
  }
  throw new Refusal('TOO_MANY', `a thousand slugs begin with ${made}`);
}
