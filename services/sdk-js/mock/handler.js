// A call in a test: Node.js settles promises.

export function handlerOf({ document, run, answerOf, failureOf }) {
  return {
    describe: () => document,

    async handle(action, payload) {
      try {
        return answerOf(await run(action, payload));
      } catch (thrown) {
        throw failureOf(thrown) ?? thrown;
      }
    },
  };
}
