// Texts to URL slugs. Reads `longest` from its configuration, and keeps the slugs that it gave out.
import { Bucket, config, Failure, log } from 'mb-service';

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

/** The slug of `{ text }`. */
export function make(request) {
  if (typeof request?.text !== 'string') throw new Failure('INVALID_ARGUMENTS', 'text must be a text');
  const made = slug(request.text, longest());
  if (made === '') throw new Failure('NOTHING_LEFT', 'no letter and no digit is in the text');
  return { slug: made };
}

/** The first of slug, slug-2, slug-3 … that was not given out. */
export function unique(request) {
  const made = make(request).slug;
  const given = Bucket.open('given');
  for (let number = 1; number <= 1000; number += 1) {
    const candidate = number === 1 ? made : `${made}-${number}`;
    if (given.exists(candidate)) continue;
    given.set(candidate, '');
    log.info(`gave out ${candidate}`);
    return { slug: candidate };
  }
  throw new Failure('TOO_MANY', `a thousand slugs begin with ${made}`);
}

function longest() {
  const value = config.getOr('longest', 80);
  if (!Number.isInteger(value) || value < 1) throw new Failure('CONFIG_FAILED', 'longest must be a whole number from 1');
  return value;
}
