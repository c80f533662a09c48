// What the service does. An action takes one value and answers one, or a promise of it.
import { Failure } from 'mb-service';

export function greet(person) {
  if (typeof person?.name !== 'string') throw new Failure('INVALID_ARGUMENTS', 'name must be a text');
  if (person.name === '') throw new Failure('NAME_EMPTY', 'the name must not be empty');
  console.log(`greeting ${person.name}`);
  return { text: `Hello, ${person.name}!` };
}
