//! Random modules that write to whatever they can, by seed.

use std::fmt::Write as _;

/// Pages that a module begins with.
pub(super) const PAGES: u32 = 2;
/// Functions of each module; all of them are exported as `f0`, `f1` and so on.
pub(super) const FUNCTIONS: usize = 4;
/// Globals of each module that are exported as `g0`, `g1` and so on, by their types.
pub(super) const GLOBALS: [&str; 4] = ["i32", "i64", "f32", "f64"];

/// Of every store instruction, what it stores and how many lanes it has.
const STORES: [(&str, &str, u32); 14] = [
    ("i32.store", "i32", 0),
    ("i32.store8", "i32", 0),
    ("i32.store16", "i32", 0),
    ("i64.store", "i64", 0),
    ("i64.store8", "i64", 0),
    ("i64.store16", "i64", 0),
    ("i64.store32", "i64", 0),
    ("f32.store", "f32", 0),
    ("f64.store", "f64", 0),
    ("v128.store", "v128", 0),
    ("v128.store8_lane", "v128", 16),
    ("v128.store16_lane", "v128", 8),
    ("v128.store32_lane", "v128", 4),
    ("v128.store64_lane", "v128", 2),
];

/// Offsets at which marks begin and end to hold.
const OFFSETS: [u32; 20] = [
    0, 1, 2, 3, 4, 8, 16, 100, 238, 240, 241, 248, 255, 256, 257, 500, 1008, 1024, 4093, 65_535,
];
/// What all those functions take and give.
const KIND: &str = "(param i32 i32 i32) (result i32)";
const LENGTHS: [u32; 12] = [0, 1, 2, 7, 255, 256, 1023, 1024, 1025, 3000, 20_000, 70_000];

/// Xorshift: the same numbers for the same seed, everywhere.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(super) fn below(&mut self, end: u32) -> u32 {
        (self.next() % u64::from(end)) as u32
    }

    pub(super) fn one_in(&mut self, count: u32) -> bool {
        self.below(count) == 0
    }

    pub(super) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u32) as usize]
    }

    /// An address: anywhere, around the ends of cards, around the end of it
    /// all, and seldom beyond.
    pub(super) fn address(&mut self) -> u32 {
        let end = PAGES * 65_536;
        match self.below(12) {
            0..4 => self.below(end),
            4..9 => {
                (1024 * (1 + self.below(end / 1024 - 1))).saturating_sub(self.below(40))
                    + self.below(20)
            }
            9 | 10 => end - 40 + self.below(39),
            _ if self.one_in(6) => self.next() as u32,
            _ => end - 300 + self.below(290),
        }
    }
}

/// Modules in the text format that share one memory and one table, and what of
/// them is to be known.
pub(super) struct Generated {
    /// The first has what the others import as of `env`.
    pub(super) modules: Vec<String>,
    pub(super) grows: bool,
}

pub(super) fn generate(random: &mut Random) -> Generated {
    let grows = random.one_in(3);
    let count = [1, 1, 2, 3][random.below(4) as usize];
    let modules = (0..count).map(|module| {
        let mut text = "(module (import \"host\" \"get\" (func $get (param i32 i32)))".to_owned();
        text += &if module == 0 {
            format!(
                "(memory (export \"memory\") {PAGES} 20) (table (export \"table\") {} funcref)
                 (global $g0 (export \"g0\") (mut i32) (i32.const 7)) (global $g1 (export \"g1\") (mut i64) (i64.const -7))\n",
                count * FUNCTIONS
            )
        } else {
            "(import \"env\" \"memory\" (memory 1)) (import \"env\" \"table\" (table 1 funcref)) (export \"memory\" (memory 0))
             (import \"env\" \"g0\" (global $g0 (mut i32))) (import \"env\" \"g1\" (global $g1 (mut i64)))
             (export \"g0\" (global $g0)) (export \"g1\" (global $g1))\n"
                .to_owned()
        };
        text + &inside(random, grows, module, count) + ")"
    });
    Generated {
        modules: modules.collect(),
        grows,
    }
}

/// What a module has that is like that of every other one.
fn inside(random: &mut Random, grows: bool, module: usize, modules: usize) -> String {
    let mut text = "(global $g2 (export \"g2\") (mut f32) (f32.const 1.5)) (global $g3 (export \"g3\") (mut f64) (f64.const 2.5))
         (global $g4 (mut v128) (v128.const i32x4 1 2 3 4))
         (func (export \"g4\") (result i32) (i32x4.extract_lane 2 (global.get $g4)))
         (func (export \"size\") (result i32) (memory.size))
         (func (export \"post\") (param i32) (i32.store (i32.const 70000) (local.get 0)))
         (func (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32) (local.get 0))
         (data $passive \"bytes that are asked for, here and there\")\n"
        .to_owned();
    let step = random.of(&[1, 20, 1023, 1500]);
    let _ = writeln!(
        text,
        "(func $deep (export \"deep\") (param $at i32) (param $turns i32) (result i32)
           (i32.store (local.get $at) (local.get $turns)) (global.set $g0 (local.get $turns))
           (if (result i32) (local.get $turns)
             (then (i32.add (i32.const 1) (call $deep
               (i32.and (i32.add (local.get $at) (i32.const {step})) (i32.const 0x1fff0))
               (i32.sub (local.get $turns) (i32.const 1)))))
             (else (i32.load (local.get $at)))))"
    );
    for _ in 0..random.below(5) {
        let at = random.below(PAGES * 65_536 - 30);
        let _ = writeln!(
            text,
            "(data (i32.const {at}) \"what is there at the start\")"
        );
    }
    let (first, end) = (module * FUNCTIONS, (module + 1) * FUNCTIONS);
    let _ = write!(text, "(elem (i32.const {first})");
    for function in first..end {
        let _ = write!(text, " $f{function}");
    }
    text += ")\n";
    let mut body = |function, most| {
        let mut body = Body {
            random,
            grows,
            function,
            own_end: end,
            end: modules * FUNCTIONS,
            depth: 0,
            text: String::new(),
        };
        body.statements(most);
        body.text
    };
    for function in first..end {
        let body = body(function, 6);
        let _ = writeln!(
            text,
            "(func $f{function} (export \"f{function}\") (param $a i32) (param $b i32) (param $c i32) (result i32)
               (local $d i32) (local $l i64) (local $n0 i32) (local $n1 i32) (local $n2 i32)
               {body} (i32.xor (local.get $a) (local.get $d)))"
        );
    }
    // Which calls nothing: what comes after its module is not there yet.
    let start = body(modules * FUNCTIONS, 3);
    if random.one_in(2) {
        let _ = writeln!(
            text,
            "(func $start (local $a i32) (local $b i32) (local $c i32) (local $d i32) (local $l i64)
               (local $n0 i32) (local $n1 i32) (local $n2 i32) {start}) (start $start)"
        );
    }
    text
}

struct Body<'a> {
    random: &'a mut Random,
    grows: bool,
    /// Its number, among those of all modules.
    function: usize,
    /// Of the functions of its own module, and of all.
    own_end: usize,
    end: usize,
    depth: usize,
    text: String,
}

impl Body<'_> {
    fn statements(&mut self, most: u32) {
        for _ in 0..=self.random.below(most) {
            self.statement();
            self.text.push('\n');
        }
    }

    fn local(&mut self) -> &'static str {
        self.random.of(&["$a", "$b", "$c", "$d"])
    }

    /// An address of four bytes on the stack, most often within bounds.
    fn address(&mut self) -> String {
        let local = self.local();
        match self.random.below(10) {
            0..4 if local != "$d" => format!("(local.get {local})"),
            4 => format!("(i32.and (local.get {local}) (i32.const 0x1ffff))"),
            5 => format!(
                "(local.tee {local} (i32.and (i32.add (local.get {local}) (i32.const {})) (i32.const 0x1ffff)))",
                self.random.below(3000)
            ),
            _ => format!("(i32.const {})", self.random.address().cast_signed()),
        }
    }

    fn value(&mut self, kind: &str) -> String {
        let local = self.local();
        match kind {
            "i64" => {
                format!("(i64.mul (i64.extend_i32_u (local.get {local})) (i64.const 0x100000001))")
            }
            "v128" => format!("(i32x4.splat (local.get {local}))"),
            "f32" | "f64" => format!("({kind}.convert_i32_u (local.get {local}))"),
            _ => match self.random.below(4) {
                0 => format!("(i32.const {})", (self.random.next() as u32).cast_signed()),
                1 => format!("(i32.load (i32.and (local.get {local}) (i32.const 0xffff)))"),
                _ => format!("(local.get {local})"),
            },
        }
    }

    fn store(&mut self, address: &str) {
        let (name, kind, lanes) = self.random.of(&STORES);
        let value = self.value(kind);
        let offset = self.random.of(&OFFSETS);
        let lane = if lanes > 0 {
            format!(" {}", self.random.below(lanes))
        } else {
            String::new()
        };
        let _ = write!(
            self.text,
            "({name} offset={offset}{lane} {address} {value})"
        );
    }

    fn statement(&mut self) {
        let local = self.local();
        match self.random.below(23) {
            0..4 => {
                let address = self.address();
                self.store(&address);
            }
            // Several at one address, as compiled code does.
            4..8 => {
                // What $d holds is seldom an address.
                let local = if local == "$d" { "$a" } else { local };
                for _ in 0..2 + self.random.below(4) {
                    self.store(&format!("(local.get {local})"));
                    match self.random.below(8) {
                        0 => {
                            let _ = write!(
                                self.text,
                                "(local.set {local} (i32.and (i32.add (local.get {local}) (i32.const 700)) (i32.const 0x1ffff)))"
                            );
                        }
                        1 => {
                            let _ = write!(self.text, "(drop (i32.load offset=4 (local.get $b)))");
                        }
                        2 => self.call(),
                        3 => self.store(&format!(
                            "(local.tee {local} (i32.and (i32.add (local.get {local}) (i32.const 900)) (i32.const 0x1ffff)))"
                        )),
                        // Another address in it, though nothing is marked there.
                        4 => {
                            let _ = write!(
                                self.text,
                                "(drop (local.tee {local} (i32.and (i32.add (local.get {local}) (i32.const 1300)) (i32.const 0x1ffff))))"
                            );
                        }
                        _ => {}
                    }
                }
            }
            8 => {
                let address = self.random.address().cast_signed();
                let _ = write!(self.text, "(local.set {local} (i32.const {address}))");
            }
            9 => {
                let (global, kind) = self.random.of(&[
                    ("$g0", "i32"),
                    ("$g1", "i64"),
                    ("$g2", "f32"),
                    ("$g3", "f64"),
                    ("$g4", "v128"),
                ]);
                let value = self.value(kind);
                let _ = write!(self.text, "(global.set {global} {value})");
            }
            10 => {
                let (to, length) = (self.address(), self.random.of(&LENGTHS));
                let value = self.value("i32");
                let _ = write!(self.text, "(memory.fill {to} {value} (i32.const {length}))");
            }
            11 => {
                let (to, from, length) = (self.address(), self.address(), self.random.of(&LENGTHS));
                let _ = write!(self.text, "(memory.copy {to} {from} (i32.const {length}))");
            }
            12 => {
                let (to, length) = (self.address(), self.random.below(30));
                let _ = write!(
                    self.text,
                    "(memory.init $passive {to} (i32.const 5) (i32.const {length}))"
                );
            }
            13 | 14 if self.depth < 3 => {
                let bit = 1 << self.random.below(4);
                let _ = write!(
                    self.text,
                    "(if (i32.and (local.get {local}) (i32.const {bit})) (then "
                );
                self.nested(3);
                self.text += ") (else ";
                self.nested(2);
                self.text += "))";
            }
            15 | 16 if self.depth < 3 => {
                let (count, turns) = (format!("$n{}", self.depth), 1 + self.random.below(4));
                let _ = write!(
                    self.text,
                    "(local.set {count} (i32.const {turns})) (loop $loop{} ",
                    self.depth
                );
                let depth = self.depth;
                self.nested(3);
                let _ = write!(self.text, "(local.set {local} (i32.and (i32.add (local.get {local}) (i32.const 1500)) (i32.const 0x1ffff)))
                    (br_if $loop{depth} (local.tee {count} (i32.sub (local.get {count}) (i32.const 1)))))");
            }
            17 if self.depth < 3 => {
                let depth = self.depth;
                let _ = write!(
                    self.text,
                    "(block $block{depth} (br_if $block{depth} (i32.and (local.get {local}) (i32.const 1))) "
                );
                self.nested(3);
                self.text.push(')');
            }
            18 if self.grows => {
                let pages = self.random.of(&[0, 1, 1, 2, 5]);
                let _ = write!(
                    self.text,
                    "(local.set $d (memory.grow (i32.const {pages})))
                     (i32.store (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 20)) (local.get $a))"
                );
            }
            19 => self.call(),
            22 => {
                let bit = 1 << self.random.below(4);
                self.tail_call(bit);
            }
            20 => {
                let address = self.random.address().min(130_000);
                let _ = write!(
                    self.text,
                    "(call $get (local.get {local}) (i32.const {address}))"
                );
            }
            21 if self.random.one_in(4) => {
                let _ = write!(
                    self.text,
                    "(if (i32.eq (i32.and (local.get {local}) (i32.const 7)) (i32.const 3)) (then unreachable))"
                );
            }
            _ => {
                let _ = write!(
                    self.text,
                    "(local.set {local} (i32.load (i32.and (local.get {local}) (i32.const 0x1fff0))))"
                );
            }
        }
    }

    fn nested(&mut self, most: u32) {
        self.depth += 1;
        self.statements(most);
        self.depth -= 1;
    }

    /// Calls a later function, so that nothing calls itself; one of another
    /// module by the table.
    fn call(&mut self) {
        let Some((callee, directly)) = self.callee() else {
            return;
        };
        let arguments = "(local.get $b) (local.get $a) (local.get $d)";
        let _ = if directly {
            write!(self.text, "(local.set $d (call $f{callee} {arguments}))")
        } else {
            write!(
                self.text,
                "(local.set $d (call_indirect {KIND} {arguments} (i32.const {callee})))"
            )
        };
    }

    /// Sometimes ends with another function in its place.
    fn tail_call(&mut self, bit: u32) {
        let (local, Some((callee, directly))) = (self.local(), self.callee()) else {
            return;
        };
        let arguments = "(local.get $b) (local.get $c) (local.get $a)";
        let call = if directly {
            format!("(return_call $f{callee} {arguments})")
        } else {
            format!("(return_call_indirect {KIND} {arguments} (i32.const {callee}))")
        };
        let _ = write!(
            self.text,
            "(if (i32.and (local.get {local}) (i32.const {bit})) (then {call}))"
        );
    }

    /// A later function, and whether it is called by its name.
    fn callee(&mut self) -> Option<(usize, bool)> {
        let later = self.function + 1;
        if later >= self.end {
            return None;
        }
        let callee = later + self.random.below((self.end - later) as u32) as usize;
        Some((callee, callee < self.own_end && self.random.one_in(2)))
    }
}
