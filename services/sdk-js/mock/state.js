export const state = {};

export function reset() {
  Object.assign(state, {
    config: new Map(),
    buckets: new Map(),
    services: new Map(),
    lines: [],
    context: {
      requestId: 'test',
      parentRequestId: undefined,
      requestedVersion: '1.0.0',
      principal: undefined,
      connectionId: '1',
      encrypted: false,
      remainingMs: 5000,
    },
  });
}

reset();
