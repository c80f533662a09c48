import { state } from './state.js';

export const log = (level, source, text) => void state.lines.push(`${level}: ${text}`);
