// What a service rarely needs to know about the call that it serves.
import * as imported from '#context';

export const requestId = () => imported.requestId() ?? undefined;
export const parentRequestId = () => imported.parentRequestId() ?? undefined;
export const requestedVersion = () => imported.requestedVersion();
export const principal = () => imported.principal() ?? undefined;
export const connectionId = () => imported.connectionId();
export const encrypted = () => imported.encrypted();
/** Milliseconds until the deadline. */
export const remaining = () => imported.remainingMs();
