import { Cas as ImportedCas, increment as add, swap } from 'wasi:keyvalue/atomics@0.2.0-draft2';
import { open as imported } from 'wasi:keyvalue/store@0.2.0-draft2';
import { atEnd } from '#start';
export { setMany, deleteMany } from 'wasi:keyvalue/batch@0.2.0-draft2';
export { setFor, keysFrom } from 'mb:service/values@1.1.0';
export { swap };

// A handle that outlives its call would cost a fresh instance.
const untilEnd = (handle) => {
  atEnd(() => handle[Symbol.dispose]());
  return handle;
};

export const open = (name) => untilEnd(imported(name));
export const increment = (bucket, key, delta) => add(bucket, key, delta);
export const Cas = { new: (bucket, key) => untilEnd(ImportedCas.new(bucket, key)) };
