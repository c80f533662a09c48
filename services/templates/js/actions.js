// What the service does, without the server: tested with plain Node.

/** A refusal of the service's own: the code is [A-Z][A-Z0-9_]*. */
export class Refusal extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export const actions = {
  greet(person) {
    if (typeof person?.name !== 'string') throw new Refusal('INVALID_ARGUMENTS', 'name must be a text');
    if (person.name === '') throw new Refusal('NAME_EMPTY', 'the name must not be empty');
    console.log(`greeting ${person.name}`);
    return { text: `Hello, ${person.name}!` };
  },
};
