//! Hints to the machine about weights, which are large, read in order and never change. None affects a result.
#![allow(unsafe_code)] // a system call and an instruction that take addresses

/// Asks the system to hold `data` in huge pages (Linux; elsewhere nothing): a decode step streams all weights, and with
/// small pages its address translations alone do not fit the caches.
pub(super) fn use_huge_pages<T>(data: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const HUGE_PAGE: usize = 2 << 20;
        const MADV_HUGEPAGE: i32 = 14;
        const MADV_COLLAPSE: i32 = 25; // since Linux 6.1; refused before
        unsafe extern "C" {
            fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
        }
        let bytes = data.as_ptr_range();
        let (start, end) = ((bytes.start as usize).next_multiple_of(HUGE_PAGE), bytes.end as usize);
        if let Some(length @ HUGE_PAGE..) = end.checked_sub(start).map(|length| length / HUGE_PAGE * HUGE_PAGE) {
            for advice in [MADV_HUGEPAGE, MADV_COLLAPSE] {
                // SAFETY: the range lies within `data`; both hints change how it is backed, never what it holds. A
                // refusal is as good as none.
                unsafe { madvise(start as *mut std::ffi::c_void, length, advice) };
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = data;
}

/// Starts to fetch the cache line at `address`, which need not be valid.
#[inline(always)]
pub(super) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint: it faults on no address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
