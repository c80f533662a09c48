import { state } from './state.js';

export const get = (key) => state.config.get(key);
