/** What an imported function has thrown, as a text: `{ tag, val }`, a text, or an Error that carries one of them. */
export function reasonOf(error) {
  const reason = error?.payload ?? error;
  if (typeof reason === 'string') return reason;
  return reason?.val ?? reason?.tag ?? reason?.message ?? String(reason);
}
