// A call, as the server makes it.
import { crash, forget, settle, writeEarly } from '#start';
import { Failure } from '../failure.js';

export function handlerOf({ document, run, answerOf, failureOf }) {
  return {
    describe() {
      writeEarly();
      return document;
    },

    handle(action, payload) {
      // In an instance that serves several calls, another one may have left something.
      forget();
      try {
        const settled = settle(run(action, payload));
        if (settled === undefined) {
          throw new Failure('NEVER_SETTLED', `the promise of ${action} can never settle: no job and no timer is left that could do it`);
        }
        if ('reason' in settled) throw settled.reason;
        return answerOf(settled.value);
      } catch (thrown) {
        throw failureOf(thrown) ?? crash(thrown);
      } finally {
        const left = forget();
        if (left > 0) console.warn(`${action} did not wait for ${left} of its timers: they were dropped`);
      }
    },
  };
}
