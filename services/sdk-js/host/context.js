export { requestId, parentRequestId, requestedVersion, principal, connectionId, encrypted, remainingMs } from 'mb:service/context@1.1.0';
