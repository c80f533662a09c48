const CODE = /^[A-Z][A-Z0-9_]{0,63}$/;

/** A service's own refusal: the caller gets its code, message and details. */
export class Failure extends Error {
  constructor(code, message, details) {
    super(message);
    this.name = 'Failure';
    if (!CODE.test(code)) throw new TypeError(`${code} is no code of a failure: it must match ${CODE.source}`);
    this.code = code;
    this.details = details;
  }
}
