// The types of what `mock/index.js` exports.
import type { Handler } from './index.js';

/** A server for tests with plain Node.js. */
export const mock: {
  /** Forgets everything; call it before each test. */
  reset(): void;
  /** Grants a value. */
  config(key: string, value: string | number | boolean): void;
  /** Has `topic` answer what `answer` gives; a Failure that it throws is the other service's. */
  serve(topic: string, answer: (value: any) => unknown): void;
  /** The text that is stored in a bucket. */
  value(bucket: string, key: string): string | undefined;
  /** Lines of the log, as `level: text`. */
  lines(): string[];
  /** Says who calls. */
  context(values: {
    requestId?: string;
    parentRequestId?: string;
    requestedVersion?: string;
    principal?: string;
    connectionId?: string;
    encrypted?: boolean;
    remainingMs?: number;
  }): void;
};

/** Calls an action as the server would: resolves to its answer, rejects with its failure. */
export function ask(handler: Handler, action: string, value?: unknown): Promise<any>;
