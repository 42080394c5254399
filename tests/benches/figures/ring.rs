//! Figure: what a ring costs a chain (pop, walk, complete, publish), both layouts, against the
//! virtio-queue crate, which has the split layout only. By time, and by instructions where valgrind
//! is installed: this program starts itself under it with `--ring`.

use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::machine::Result;
use super::sample::{Samples, to_f64};
use aerostat_device::{BenchRing, Gpa, GuestMemory, Region};
use serde_json::{Value, json};
use std::process::Command;
use std::time::Instant;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Chains a lap, and descriptors of the ring.
const CHAINS: u16 = 256;
const MEMORY: usize = 4 << 20;
const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const TABLES: u64 = 0x10_0000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// Who serves the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Theirs,
    Split,
    Packed,
    /// Nobody: what the guest's side and the measuring cost, for each layout.
    NobodySplit,
    NobodyPacked,
}

impl Server {
    const MEASURED: [Self; 3] = [Self::Theirs, Self::Split, Self::Packed];
    const ALL: [Self; 5] = [
        Self::Theirs,
        Self::Split,
        Self::Packed,
        Self::NobodySplit,
        Self::NobodyPacked,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Theirs => "virtio-queue",
            Self::Split => "split",
            Self::Packed => "packed",
            Self::NobodySplit => "nobody-split",
            Self::NobodyPacked => "nobody-packed",
        }
    }

    fn is_packed(self) -> bool {
        matches!(self, Self::Packed | Self::NobodyPacked)
    }
}

/// What a chain looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// A readable buffer: an array of page numbers.
    Array,
    /// An indirect table of 32 writable buffers: a report.
    Report,
}

impl Shape {
    const ALL: [Self; 2] = [Self::Array, Self::Report];

    fn name(self) -> &'static str {
        match self {
            Self::Array => "1 buffer",
            Self::Report => "32 buffers, indirect",
        }
    }

    fn buffers(self) -> u64 {
        match self {
            Self::Array => 1,
            Self::Report => 32,
        }
    }
}

/// Both sides of one ring.
struct Rig {
    server: Server,
    shape: Shape,
    memory: GuestMemoryMmap,
    ours: Option<BenchRing>,
    theirs: Queue,
    heads: Vec<u16>,
    lap: u16,
}

impl Rig {
    #[allow(unsafe_code, reason = "both look at the same memory")]
    fn new(server: Server, shape: Shape) -> Result<Self> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
        let region = Region {
            gpa: Gpa(0),
            len_bytes: MEMORY as u64,
            hva: memory.get_host_address(GuestAddress(0))? as usize,
            fd: None,
            fd_offset_bytes: 0,
            page_size_bytes: 4096,
            frame_bytes: 0,
            shared: false,
            readonly: false,
            extra: false,
            guest_node: aerostat_device::GuestNode(0),
            pinned: false,
            node: None,
        };
        // SAFETY: the memory is mapped as long as the rig, which holds the table too, and only read
        // and written through both crates' own accesses.
        let table = unsafe { GuestMemory::new(vec![region]) }?;
        let ours = match server {
            Server::Split | Server::Packed => {
                let places = [DESC, AVAIL, USED].map(Gpa);
                Some(BenchRing::new(&table, CHAINS, places, server.is_packed())?)
            }
            _ => None,
        };
        let mut theirs = Queue::new(CHAINS)?;
        let low = |gpa: u64| u32::try_from(gpa).ok();
        theirs.set_desc_table_address(low(DESC), Some(0));
        theirs.set_avail_ring_address(low(AVAIL), Some(0));
        theirs.set_used_ring_address(low(USED), Some(0));
        theirs.set_ready(true);
        let rig = Self {
            server,
            shape,
            memory,
            ours,
            theirs,
            heads: Vec::new(),
            lap: 0,
        };
        rig.lay_out()?;
        Ok(rig)
    }

    /// Descriptors and tables, which stay as they are; the packed ring is written anew each lap.
    fn lay_out(&self) -> Result<()> {
        for chain in 0..CHAINS {
            let table = TABLES + 512 * u64::from(chain);
            for entry in 0..32u16 {
                let next = if entry < 31 && !self.server.is_packed() {
                    NEXT
                } else {
                    0
                };
                let gpa = 0x20_0000 + 4096 * u64::from(entry);
                self.put(
                    table + 16 * u64::from(entry),
                    gpa,
                    4096,
                    WRITE | next,
                    entry + 1,
                )?;
            }
            let (gpa, len, flags) = self.direct(chain);
            self.put(DESC + 16 * u64::from(chain), gpa, len, flags, 0)?;
            let slot = AVAIL + 4 + 2 * u64::from(chain);
            self.memory.write_obj(chain.to_le(), GuestAddress(slot))?;
        }
        Ok(())
    }

    fn direct(&self, chain: u16) -> (u64, u32, u16) {
        match self.shape {
            Shape::Array => (0x20_0000, 1024, 0),
            Shape::Report => (TABLES + 512 * u64::from(chain), 512, INDIRECT),
        }
    }

    /// The last two fields of a descriptor are flags and next in the split layout.
    fn put(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) -> Result<()> {
        self.memory.write_obj(gpa.to_le(), GuestAddress(at))?;
        self.memory.write_obj(len.to_le(), GuestAddress(at + 8))?;
        let last = if self.server.is_packed() {
            [next, flags]
        } else {
            [flags, next]
        };
        for (field, offset) in last.into_iter().zip([12, 14]) {
            self.memory
                .write_obj(field.to_le(), GuestAddress(at + offset))?;
        }
        Ok(())
    }

    /// The guest makes all chains available.
    fn offer(&mut self) -> Result<()> {
        if self.server.is_packed() {
            // The wrap counter changes with each lap, as a lap is the whole ring.
            let marks = if self.lap.is_multiple_of(2) {
                1 << 7
            } else {
                1 << 15
            };
            for chain in 0..CHAINS {
                let (gpa, len, flags) = self.direct(chain);
                self.put(DESC + 16 * u64::from(chain), gpa, len, flags | marks, chain)?;
            }
        } else {
            let index = self.lap.wrapping_add(1).wrapping_mul(CHAINS);
            self.memory
                .write_obj(index.to_le(), GuestAddress(AVAIL + 2))?;
        }
        self.lap = self.lap.wrapping_add(1);
        Ok(())
    }

    /// The device's side; returns how many buffers and bytes it saw.
    fn serve(&mut self) -> Result<(u64, u64)> {
        if let Some(ring) = &mut self.ours {
            let (buffers, bytes) = ring.serve();
            return Ok((buffers as u64, bytes));
        }
        let (mut buffers, mut bytes) = (0, 0);
        if self.server == Server::Theirs {
            self.heads.clear();
            for chain in self.theirs.iter(&self.memory)? {
                self.heads.push(chain.head_index());
                for descriptor in chain {
                    buffers += 1;
                    bytes += u64::from(descriptor.len());
                }
            }
            for head in &self.heads {
                self.theirs.add_used(&self.memory, *head, 0)?;
            }
            std::hint::black_box(self.theirs.needs_notification(&self.memory)?);
        }
        Ok((buffers, bytes))
    }
}

/// `--ring SERVER SHAPE LAPS`: nothing but that, for valgrind.
pub(crate) fn child(arguments: &[String]) -> Result<()> {
    let [server, shape, laps] = arguments else {
        return Err("--ring SERVER SHAPE LAPS".into());
    };
    let server = Server::ALL.into_iter().find(|known| known.name() == server);
    let shape = Shape::ALL.into_iter().find(|known| known.name() == shape);
    let (server, shape) = (
        server.ok_or("no such server")?,
        shape.ok_or("no such shape")?,
    );
    let mut rig = Rig::new(server, shape)?;
    for _ in 0..laps.parse::<u32>()? {
        rig.offer()?;
        std::hint::black_box(rig.serve()?);
    }
    Ok(())
}

pub(crate) struct Case {
    shape: &'static str,
    /// Nanoseconds a chain, in the order of [`Server::MEASURED`].
    time: [Samples; 3],
    /// Instructions a chain.
    instructions: Option<[f64; 3]>,
}

pub(crate) fn run(bench: &Bench) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for shape in Shape::ALL {
        bench.step(&format!("ring: {}", shape.name()));
        let rigs = Server::MEASURED.map(|server| Rig::new(server, shape));
        let mut rigs = rigs.into_iter().collect::<Result<Vec<_>>>()?;
        let mut time = [const { None }; 3].map(|_: Option<()>| Samples::default());
        let laps: u32 = if bench.measures() { 400 } else { 3 };
        let rounds = if bench.measures() { 41 } else { 1 };
        for round in 0..rounds {
            for turn in 0..rigs.len() {
                let place = (turn + round) % rigs.len();
                let rig = &mut rigs[place];
                let mut nanoseconds = 0;
                for _ in 0..laps {
                    rig.offer()?;
                    let begin = Instant::now();
                    let (buffers, _) = rig.serve()?;
                    nanoseconds += u64::try_from(begin.elapsed().as_nanos())?;
                    assert_eq!(
                        buffers,
                        u64::from(CHAINS) * shape.buffers(),
                        "{:?}",
                        rig.server
                    );
                }
                let chains = u64::from(laps) * u64::from(CHAINS);
                time[place].push(to_f64(nanoseconds) / to_f64(chains));
            }
        }
        let instructions = if bench.measures() {
            instructions(bench, shape)?
        } else {
            None
        };
        cases.push(Case {
            shape: shape.name(),
            time,
            instructions,
        });
    }
    Ok(cases)
}

/// Instructions a chain: of more laps less those of fewer, and of that the guest's own part.
fn instructions(bench: &Bench, shape: Shape) -> Result<Option<[f64; 3]>> {
    const FEW: u32 = 50;
    const MANY: u32 = 150;
    let chains = f64::from(MANY - FEW) * f64::from(CHAINS);
    let a_chain = |server: Server| -> Result<Option<f64>> {
        let (Some(few), Some(many)) = (count(server, shape, FEW)?, count(server, shape, MANY)?)
        else {
            return Ok(None);
        };
        Ok(Some(to_f64(many.saturating_sub(few)) / chains))
    };
    let mut found = [0.0; 3];
    for (server, slot) in Server::MEASURED.into_iter().zip(&mut found) {
        let nobody = if server.is_packed() {
            Server::NobodyPacked
        } else {
            Server::NobodySplit
        };
        let (Some(all), Some(guest)) = (a_chain(server)?, a_chain(nobody)?) else {
            bench.note("instructions of rings are not counted: valgrind is not installed");
            return Ok(None);
        };
        *slot = all - guest;
    }
    Ok(Some(found))
}

/// What callgrind counts for a run of this program; `None` without valgrind.
fn count(server: Server, shape: Shape, laps: u32) -> Result<Option<u64>> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["--ring", server.name(), shape.name(), &laps.to_string()])
        .output();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        output => output?,
    };
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text
        .lines()
        .find_map(|line| line.split("Collected : ").nth(1));
    let collected = collected.ok_or_else(|| format!("callgrind said: {text}"))?;
    Ok(Some(collected.trim().parse()?))
}

pub(crate) fn print(cases: &[Case]) {
    println!("A chain on the ring (pop, walk, complete, publish)");
    for case in cases {
        for (place, server) in Server::MEASURED.into_iter().enumerate() {
            let instructions = case.instructions.map_or_else(String::new, |all| {
                format!("{:>8.0} instructions", all[place])
            });
            println!(
                "{:<22} {:<14} {:>8.1} ns{instructions}",
                case.shape,
                server.name(),
                case.time[place].median()
            );
        }
    }
    println!();
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let mut claims = Vec::new();
    for case in cases {
        for (place, layout) in [(1, "split"), (2, "packed")] {
            let mut claim = |figure, ratios| {
                claims.push(Claim {
                    figure,
                    case: format!("{layout}, {}", case.shape),
                    against: "virtio-queue (split)",
                    goal: Goal::AtMost(0.8),
                    ratios,
                });
            };
            claim("ring, time a chain", case.time[place].over(&case.time[0]));
            if let Some(all) = case.instructions {
                let ratio = all[place] / all[0];
                claim("ring, instructions a chain", [ratio].into_iter().collect());
            }
        }
    }
    claims
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let case = |case: &Case| {
        let servers: Vec<Value> = Server::MEASURED
            .into_iter()
            .enumerate()
            .map(|(place, server)| {
                json!({
                    "server": server.name(),
                    "ns_per_chain": case.time[place].values(),
                    "instructions_per_chain": case.instructions.map(|all| all[place]),
                })
            })
            .collect();
        json!({ "chain": case.shape, "servers": servers })
    };
    json!({ "figure": "ring", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
