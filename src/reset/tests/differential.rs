//! Random modules, reset against fresh: after each call and after each reset
//! the results, the whole memory and all globals are those of an instance that
//! was made for it.
//!
//! ```text
//! MB_RESET_MODULES=20000 MB_RESET_SEED=1 cargo test --release --lib differential -- --nocapture
//! ```

use wasmtime::{Caller, Config, Engine, Extern, Instance, Linker, Module, OptLevel, Store, Val};

use super::generator::{FUNCTIONS, GLOBALS, Random, generate};
use crate::{
    CARDS_INSTANCE, CHECKPOINT, RESET, VERIFY,
    module::{self, Rewriting},
    module_shape::{ModuleShape, Space},
};

/// Modules of a plain `cargo test`; a seed counts up from there.
const MODULES: u64 = 400;
const CALLS: usize = 30;

/// What a host function writes to where it has to put its result.
pub(super) const RESULT: usize = 700;

/// Instances that share a memory, that of the first.
struct Running {
    store: Store<()>,
    instances: Vec<Instance>,
}

/// All that a guest can see of itself.
#[derive(PartialEq)]
struct State {
    memory: Vec<u8>,
    globals: Vec<String>,
    numbers: Vec<i32>,
}

impl Running {
    /// None if a start traps.
    fn new(linker: &Linker<()>, modules: &[Module]) -> Option<Self> {
        let mut store = Store::new(linker.engine(), ());
        let mut linker = linker.clone();
        let mut instances = Vec::new();
        for module in modules {
            let instance = linker.instantiate(&mut store, module).ok()?;
            if instances.is_empty() {
                // By these names the others get what they share.
                for giver in ["env", CARDS_INSTANCE] {
                    linker.instance(&mut store, giver, instance).unwrap();
                }
            }
            instances.push(instance);
        }
        Some(Self { store, instances })
    }

    /// Calls a function of one of them; none if it traps.
    fn call(&mut self, instance: usize, name: &str, arguments: &[u32]) -> Option<Vec<i32>> {
        let function = self.instances[instance]
            .get_func(&mut self.store, name)
            .unwrap();
        let arguments: Vec<_> = arguments
            .iter()
            .map(|word| Val::I32(word.cast_signed()))
            .collect();
        let mut results = vec![Val::I32(0); function.ty(&self.store).results().len()];
        function
            .call(&mut self.store, &arguments, &mut results)
            .ok()?;
        Some(results.iter().map(Val::unwrap_i32).collect())
    }

    /// Calls that function of all of them, as components do: last that of the
    /// one with the memory, which takes all marks away.
    fn call_all(&mut self, name: &str) {
        for instance in (0..self.instances.len()).rev() {
            assert_ne!(self.call(instance, name, &[]).unwrap(), [-1]);
        }
    }

    /// What verifying says.
    fn differs(&mut self) -> bool {
        let modules = 0..self.instances.len();
        let differences = modules.map(|module| self.call(module, VERIFY, &[]).unwrap()[0]);
        differences.sum::<i32>() > 0
    }

    fn memory(&mut self) -> &mut [u8] {
        let memory = self.instances[0].get_memory(&mut self.store, "memory");
        memory.unwrap().data_mut(&mut self.store)
    }

    /// With so many bytes of its memory, or what it knows of.
    fn state(&mut self, bytes: Option<usize>) -> State {
        let (mut globals, mut numbers) = (Vec::new(), Vec::new());
        for instance in 0..self.instances.len() {
            for name in ["size", "g4"] {
                numbers.extend(self.call(instance, name, &[]).unwrap());
            }
            for global in 0..GLOBALS.len() {
                let global = self.instances[instance]
                    .get_global(&mut self.store, &format!("g{global}"))
                    .unwrap();
                globals.push(format!("{:?}", global.get(&mut self.store)));
            }
        }
        let bytes = bytes.unwrap_or(numbers[0] as usize * 65_536);
        let memory = self.memory()[..bytes].to_vec();
        State {
            memory,
            globals,
            numbers,
        }
    }
}

#[derive(Default, Debug)]
struct Count {
    modules: u64,
    /// How many of these are several that share a memory.
    several: u64,
    resets: u64,
    by_themselves: u64,
    trapped: u64,
    grown: u64,
}

pub(super) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// Checks so many modules, each thread with an engine and a count of its own.
pub(super) fn on_all_threads<T: Default + Send>(
    modules: u64,
    check: impl Fn(&Engine, u64, &mut T) + Sync,
) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    std::thread::scope(|scope| {
        let run = |thread| {
            // Without gigabytes of address space an instance is made sooner.
            let mut config = Config::new();
            config
                .cranelift_opt_level(OptLevel::None)
                .cranelift_nan_canonicalization(true)
                .wasm_backtrace_max_frames(None)
                .memory_reservation(4 << 20)
                .memory_reservation_for_growth(1 << 20)
                .memory_guard_size(64 << 10);
            let engine = Engine::new(&config).unwrap();
            let mut count = T::default();
            for module in (thread..modules).step_by(threads as usize) {
                check(&engine, module, &mut count);
            }
            count
        };
        let running: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// The host: its function leaves something where it has to.
pub(super) fn host(engine: &Engine) -> Linker<()> {
    let mut linker = Linker::new(engine);
    let get = |mut caller: Caller<'_, ()>, with: i32, to: i32| {
        let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
            panic!("it has one")
        };
        let bytes = memory
            .data_mut(&mut caller)
            .get_mut(to as u32 as usize..)
            .and_then(|rest| rest.get_mut(..RESULT));
        bytes
            .map(|bytes| bytes.fill(with as u8 | 1))
            .ok_or_else(|| wasmtime::format_err!("out of bounds"))
    };
    linker.func_wrap("host", "get", get).unwrap();
    linker
}

#[test]
fn differential() {
    let (modules, seed) = (
        setting("MB_RESET_MODULES", MODULES),
        setting("MB_RESET_SEED", 1),
    );
    let counts = on_all_threads(modules, |engine, module, count: &mut Count| {
        check(engine, seed + module, count);
    });
    let count = counts.into_iter().fold(Count::default(), |all, one| Count {
        modules: all.modules + one.modules,
        several: all.several + one.several,
        resets: all.resets + one.resets,
        by_themselves: all.by_themselves + one.by_themselves,
        trapped: all.trapped + one.trapped,
        grown: all.grown + one.grown,
    });
    println!(
        "seeds {seed} to {}: {count:?}, no difference",
        seed + modules - 1
    );
    assert!(
        count.resets > modules,
        "too few calls end well to prove anything: {count:?}"
    );
}

fn check(engine: &Engine, seed: u64, count: &mut Count) {
    let mut random = Random::new(seed);
    let generated = generate(&mut random);
    let alone = generated.modules.len() == 1;
    let resets_itself = alone && random.one_in(2);
    let (mut original, mut rewritten) = (Vec::new(), Vec::new());
    for text in &generated.modules {
        let bytes = wat::parse_str(text).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let shape = ModuleShape::of(&bytes, 0..bytes.len()).unwrap();
        let index = |name| shape.exported(Space::Function, name).unwrap();
        let post = [index("post")];
        let how = Rewriting {
            allocators: &[index("cabi_realloc")],
            host_functions: &[0],
            post_returns: if resets_itself { &post } else { &[] },
            largest_result: RESULT as u32,
            alone,
        };
        let (given, _) =
            module::rewrite(&bytes, &how).unwrap_or_else(|reason| panic!("seed {seed}: {reason}"));
        original.push(Module::new(engine, &bytes).unwrap());
        let given =
            Module::new(engine, &given).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        rewritten.push(given);
    }
    let linker = host(engine);
    count.modules += 1;
    count.several += u64::from(!alone);

    let Some(mut fresh) = Running::new(&linker, &original) else {
        return;
    };
    let first = fresh.state(None);
    // One that is reset, and what it was at its checkpoint, slack included.
    let mut reset: Option<(Running, State)> = None;
    for call in 0..CALLS {
        let at = |what: &str| format!("seed {seed}, call {call}: {what}");
        let mut made = reset.take().unwrap_or_else(|| {
            let mut made = Running::new(&linker, &rewritten).expect("the other one starts too");
            made.call_all(CHECKPOINT);
            let bytes = made.memory().len();
            let state = made.state(Some(bytes));
            (made, state)
        });
        assert!(made.0.state(None) == first, "{}", at("it is not fresh"));
        let mut fresh = Running::new(&linker, &original).expect("it did before");
        let same = if random.one_in(12) {
            allocate(&mut random, &mut fresh, &mut made.0)
        } else {
            let module = random.below(original.len() as u32) as usize;
            let (name, arguments) = if random.one_in(15) {
                // As often as not until the stack ends.
                let turns = random.of(&[3, 200, 1 << 20, 1 << 21]);
                ("deep".to_owned(), vec![random.below(100_000), turns])
            } else {
                let function = module * FUNCTIONS + random.below(FUNCTIONS as u32) as usize;
                let arguments = [(); 3].map(|()| random.address());
                (format!("f{function}"), arguments.to_vec())
            };
            let (wanted, given) = (
                fresh.call(module, &name, &arguments),
                made.0.call(module, &name, &arguments),
            );
            if wanted.is_none() {
                // Behind its end there is memory that it has not asked for.
                assert!(
                    given.is_none() || generated.grows && alone,
                    "{}",
                    at("it traps no longer")
                );
            } else {
                assert!(wanted == given, "{}", at("the result is another"));
            }
            wanted.is_some()
        };
        if !same {
            count.trapped += 1;
            // The host discards it, though what it wrote is reset even so.
            let bytes = made.1.memory.len();
            if made.0.memory().len() == bytes {
                made.0.call_all(RESET);
                let state = made.0.state(Some(bytes));
                assert!(state == made.1, "{}", at("it was not reset after a trap"));
            }
            continue;
        }
        assert!(
            fresh.state(None) == made.0.state(None),
            "{}",
            at("it did something else")
        );
        let grown = made.0.memory().len() != made.1.memory.len();
        if resets_itself {
            fresh.call(0, "post", &[1]).unwrap();
            made.0.call(0, "post", &[1]).unwrap();
        }
        if grown {
            // The host gives it up.
            count.grown += 1;
            continue;
        }
        if !resets_itself {
            let changed = made.0.state(Some(made.1.memory.len())) != made.1;
            assert_eq!(made.0.differs(), changed, "{}", at("verified"));
            made.0.call_all(RESET);
        }
        assert!(!made.0.differs(), "{}", at("verified after its reset"));
        let bytes = made.1.memory.len();
        assert!(
            made.0.state(Some(bytes)) == made.1,
            "{}",
            at("it was not reset")
        );
        count.resets += 1;
        count.by_themselves += u64::from(resets_itself);
        reset = Some(made);
    }
}

/// The host allocates, and writes to what it was given.
fn allocate(random: &mut Random, fresh: &mut Running, made: &mut Running) -> bool {
    let at = random.address().min(125_000);
    let length = random.below(5000);
    let arguments = [at, 0, 1, length];
    let range = at as usize..(at + length) as usize;
    let instance = random.below(made.instances.len() as u32) as usize;
    for running in [fresh, made] {
        assert_eq!(
            running.call(instance, "cabi_realloc", &arguments),
            Some(vec![at.cast_signed()])
        );
        running.memory()[range.clone()].fill(0xee);
    }
    true
}
