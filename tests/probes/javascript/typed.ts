export enum Colour {
  Red = 'red',
}

interface Shape<T extends number> {
  readonly sides: T;
}

export const square: Shape<4> = { sides: 4 };

export class Counter {
  constructor(private count: number) {}
  next(): number {
    return (this.count += 1);
  }
}
