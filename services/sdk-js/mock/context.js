import { state } from './state.js';

const of = (name) => () => state.context[name];
export const requestId = of('requestId');
export const parentRequestId = of('parentRequestId');
export const requestedVersion = of('requestedVersion');
export const principal = of('principal');
export const connectionId = of('connectionId');
export const encrypted = of('encrypted');
export const remainingMs = of('remainingMs');
