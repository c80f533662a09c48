// Whether the modules are still being loaded, which happens once, when the component is built.
let loading = true;
const endings = [];

export const isLoading = () => loading;

/** Has `run` called once the modules are loaded, still while the component is built. */
export const whenLoaded = (run) => endings.push(run);

export function loaded() {
  for (const run of endings) run();
  loading = false;
}
