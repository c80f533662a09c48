// Lines in the server's log, under the request that they belong to. Always there, unless the
// operator sets `log = "off"`.
import { log } from '#log';

export const trace = (text) => log('trace', '', String(text));
export const debug = (text) => log('debug', '', String(text));
export const info = (text) => log('info', '', String(text));
export const warn = (text) => log('warn', '', String(text));
export const error = (text) => log('error', '', String(text));
