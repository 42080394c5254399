//! A guest's memory in classes, and what the host has of each: resident, swapped out, or nothing.
//!
//! All amounts are bytes as floating-point numbers: the model is of flows, not of pages.

/// What a page of a guest is used for, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The kernel and services: touched all the time.
    Kernel,
    /// Memory of processes.
    Anon,
    /// Files that the present phase works on.
    HotCache,
    /// Files that nobody has asked for lately.
    ColdCache,
    /// Nothing.
    Free,
}

pub(super) const CLASSES: [Class; 5] = [
    Class::Kernel,
    Class::Anon,
    Class::HotCache,
    Class::ColdCache,
    Class::Free,
];

/// One class.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    /// Its size, as the guest sees it.
    pub(super) bytes: f64,
    /// What of it the host holds in memory.
    pub(super) resident: f64,
    /// What of it the host has swapped out.
    pub(super) swapped: f64,
}

impl Part {
    /// Takes part of it away, resident and swapped pages in proportion.
    fn split(&mut self, bytes: f64) -> Part {
        let bytes = bytes.clamp(0.0, self.bytes);
        let share = if self.bytes > 0.0 {
            bytes / self.bytes
        } else {
            0.0
        };
        let taken = Part {
            bytes,
            resident: self.resident * share,
            swapped: self.swapped * share,
        };
        self.remove(taken);
        taken
    }

    fn remove(&mut self, part: Part) {
        self.bytes = (self.bytes - part.bytes).max(0.0);
        self.resident = (self.resident - part.resident).max(0.0);
        self.swapped = (self.swapped - part.swapped).max(0.0);
    }

    fn add(&mut self, part: Part) {
        self.bytes += part.bytes;
        self.resident += part.resident;
        self.swapped += part.swapped;
    }
}

/// What an allocation cost the host.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    /// Memory that the guest had not touched, or not since it gave it back.
    pub(super) new: f64,
    /// Memory that had to be read from swap first, even to be overwritten: the host cannot know.
    pub(super) swap_in: f64,
}

/// A guest's memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    parts: [Part; 5],
    pub(super) balloon: f64,
}

impl Memory {
    /// Memory that was never touched.
    pub(super) fn new(bytes: f64) -> Self {
        let mut memory = Self::default();
        memory.parts[Class::Free as usize].bytes = bytes;
        memory
    }

    pub(super) fn part(&self, class: Class) -> &Part {
        &self.parts[class as usize]
    }

    pub(super) fn bytes(&self, class: Class) -> f64 {
        self.part(class).bytes
    }

    pub(super) fn left(&self) -> f64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    pub(super) fn resident(&self) -> f64 {
        self.parts.iter().map(|part| part.resident).sum()
    }

    pub(super) fn swapped(&self) -> f64 {
        self.parts.iter().map(|part| part.swapped).sum()
    }

    pub(super) fn cache(&self) -> f64 {
        self.bytes(Class::HotCache) + self.bytes(Class::ColdCache)
    }

    /// Uses up to `bytes` of free memory for `class`. The allocator hands out what was freed last
    /// first, so memory the host has goes before memory that was never touched.
    pub(super) fn allocate(&mut self, class: Class, bytes: f64) -> Cost {
        let free = &mut self.parts[Class::Free as usize];
        let bytes = bytes.clamp(0.0, free.bytes);
        let held = free.resident + free.swapped;
        let reused = bytes.min(held);
        let share = if held > 0.0 { reused / held } else { 0.0 };
        let cost = Cost {
            new: bytes - reused,
            swap_in: free.swapped * share,
        };
        free.remove(Part {
            bytes,
            resident: free.resident * share,
            swapped: free.swapped * share,
        });
        self.parts[class as usize].add(Part {
            bytes,
            resident: bytes,
            swapped: 0.0,
        });
        cost
    }

    /// Gives memory of a class back to the guest's allocator; the host does not notice.
    pub(super) fn free(&mut self, class: Class, bytes: f64) -> f64 {
        let part = self.parts[class as usize].split(bytes);
        self.parts[Class::Free as usize].add(part);
        part.bytes
    }

    /// Moves memory between two uses without touching it.
    pub(super) fn turn(&mut self, from: Class, to: Class, bytes: f64) {
        let part = self.parts[from as usize].split(bytes);
        self.parts[to as usize].add(part);
    }

    /// The guest frees caches until this much is free: cold ones first. Returns how much was hot.
    pub(super) fn reclaim_caches(&mut self, wanted_free: f64) -> f64 {
        let lacks = (wanted_free - self.bytes(Class::Free)).max(0.0);
        let cold = self.free(Class::ColdCache, lacks);
        self.free(Class::HotCache, lacks - cold)
    }

    /// Puts free memory into the balloon; what the host had of it is gone.
    pub(super) fn inflate(&mut self, bytes: f64) -> f64 {
        let free = &mut self.parts[Class::Free as usize];
        let bytes = bytes.clamp(0.0, free.bytes);
        let held = free.resident + free.swapped;
        let share = if held > 0.0 {
            bytes.min(held) / held
        } else {
            0.0
        };
        free.remove(Part {
            bytes,
            resident: free.resident * share,
            swapped: free.swapped * share,
        });
        self.balloon += bytes;
        bytes
    }

    /// Takes memory out of the balloon; the host has nothing of it.
    pub(super) fn deflate(&mut self, bytes: f64) {
        let bytes = bytes.clamp(0.0, self.balloon);
        self.balloon -= bytes;
        self.parts[Class::Free as usize].bytes += bytes;
    }

    /// Free page reporting: what the host holds of free memory goes back.
    pub(super) fn report_free(&mut self) {
        let free = &mut self.parts[Class::Free as usize];
        free.resident = 0.0;
        free.swapped = 0.0;
    }

    /// The host swaps part of a class out.
    pub(super) fn swap_out(&mut self, class: Class, bytes: f64) -> f64 {
        let part = &mut self.parts[class as usize];
        let bytes = bytes.clamp(0.0, part.resident);
        part.resident -= bytes;
        part.swapped += bytes;
        bytes
    }

    /// The guest touches a share of a class; returns what had to be read from swap.
    pub(super) fn touch(&mut self, class: Class, share: f64) -> f64 {
        let part = &mut self.parts[class as usize];
        let bytes = part.swapped * share.clamp(0.0, 1.0);
        part.swapped -= bytes;
        part.resident += bytes;
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_conserved_through_every_use() {
        let mut memory = Memory::new(1000.0);
        assert_eq!(memory.allocate(Class::Anon, 400.0).new, 400.0);
        memory.allocate(Class::HotCache, 300.0);
        memory.turn(Class::HotCache, Class::ColdCache, 100.0);
        memory.swap_out(Class::ColdCache, 50.0);
        memory.free(Class::Anon, 200.0);
        memory.reclaim_caches(550.0);
        memory.inflate(500.0);
        memory.deflate(100.0);

        assert!((memory.left() + memory.balloon - 1000.0).abs() < 1e-9);
        assert!(memory.resident() + memory.swapped() <= memory.left() + 1e-9);
    }

    #[test]
    fn a_swapped_page_that_is_used_again_is_read_first() {
        let mut memory = Memory::new(1000.0);
        memory.allocate(Class::Anon, 1000.0);
        memory.free(Class::Anon, 500.0);
        memory.swap_out(Class::Free, 500.0);
        let cost = memory.allocate(Class::Anon, 500.0);
        assert_eq!((cost.new, cost.swap_in), (0.0, 500.0));
    }

    #[test]
    fn what_the_balloon_takes_is_gone_from_memory_and_from_swap() {
        let mut memory = Memory::new(1000.0);
        memory.allocate(Class::Anon, 1000.0);
        memory.free(Class::Anon, 500.0);
        memory.swap_out(Class::Free, 250.0);
        memory.inflate(500.0);
        assert_eq!((memory.resident(), memory.swapped()), (500.0, 0.0));
    }
}
